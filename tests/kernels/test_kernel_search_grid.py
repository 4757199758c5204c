"""auto-round's search: natively as in the reference, whose sums are those of torch."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import IMPORTANCES, Case, Check, Make, MakeImportance, draw_cases
from numpy.typing import NDArray

from shardq.kernels import DTYPES, KernelSet
from shardq.kernels.reference.search_grids import sums_of_torch

FACTORS = np.array([8, 2, 5.5, 7, 7.94, 8.06, 9, 11, 14], np.float32)


def run(
    kernels: KernelSet,
    src: NDArray[Any],
    dtype: str,
    bits: int,
    group: int,
    importance: NDArray[np.float32] | None = None,
    factors: NDArray[np.float32] = FACTORS,
) -> tuple[NDArray[np.float32], NDArray[np.uint8], NDArray[np.float64], int]:
    scales = np.full((len(src), -(-src.shape[1] // group)), np.nan, np.float32)
    codes, losses = np.full(src.shape, 255, np.uint8), np.full((len(src), 2), -1.0)
    bad = kernels.search_grid(src, dtype, bits, group, importance, factors, scales, codes, losses)
    return scales, codes, losses, bad


@given(
    case=draw_cases(500, (1, 5, 16, 20, 32, 33, 64, 100, 128, 200, 5000)),
    bits=st.integers(2, 8),
    weights=st.sampled_from(IMPORTANCES),
    count=st.integers(1, 9),
)
@settings(max_examples=120, deadline=None)
def test_search_grid_equals_reference(
    kernels: KernelSet,
    reference: KernelSet,
    make_weights: Make,
    make_importance: MakeImportance,
    same_bits: Check,
    case: Case,
    bits: int,
    weights: str,
    count: int,
) -> None:
    src = make_weights(case.seed, case.kind, *case.shape, case.dtype)
    how = (make_importance(case.seed, weights, case.shape[1]), FACTORS[:count] * np.float32(2 ** (bits - 4)))
    with np.errstate(all="ignore"):
        found, expected = (run(k, src, case.dtype, bits, case.group, *how) for k in (kernels, reference))
    same_bits(found[0], expected[0])
    same_bits(found[1], expected[1])
    assert found[3] == expected[3]
    numbers = np.isfinite(expected[2])
    assert np.array_equal(np.isfinite(found[2]), numbers)
    same_bits(found[2][numbers], expected[2][numbers])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [2048, 11008 + 3])
def test_wide_groups_move_up_the_levels_of_torch(
    kernels: KernelSet, reference: KernelSet, make_weights: Make, same_bits: Check, dtype: str, columns: int
) -> None:
    src = make_weights(1, "plain", 3, columns, dtype)
    importance = np.linspace(0.1, 2, columns, dtype=np.float32)
    for a, b in zip(
        run(kernels, src, dtype, 4, columns, importance)[:3], run(reference, src, dtype, 4, columns, importance)[:3],
        strict=True,
    ):  # fmt: skip
        same_bits(a, b)


@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"),
    reason="torch adds in the order of AVX2 there only",
)
@pytest.mark.parametrize(
    "width", [1, 3, 5, 7, 8, 9, 20, 31, 32, 33, 63, 64, 100, 128, 130, 512, 576, 2048, 4096, 28672]
)
def test_sums_are_those_of_torch(width: int) -> None:
    x = torch.rand(1, 40, width, generator=torch.Generator().manual_seed(width)) ** 2
    assert torch.equal(sums_of_torch(x), x.sum(-1))


def test_bad_groups_are_counted_and_decode_to_zero(kernels: KernelSet) -> None:
    w = np.random.default_rng(0).standard_normal((3, 64)).astype(np.float32)
    w[0, :32], w[1, 40], w[2, 3] = 0, np.inf, np.nan
    scales, codes, losses, bad = run(kernels, w, "F32", 4, 32)
    assert bad == 2
    assert scales[1, 1] == scales[2, 0] == scales[0, 0] == np.float32(1e-5)
    assert (codes[1, 32:] == 8).all()
    assert (codes[2, :32] == 8).all()
    assert np.isfinite(losses[0]).all()
    assert not np.isfinite(losses[1:]).any()
