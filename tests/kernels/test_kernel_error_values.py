"""The error of values that come as numbers: natively as in the reference, and as that of the codes they came from."""

from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import Check, Make, WithoutNan
from numpy.typing import NDArray

from shardq.kernels import DTYPES, ELEMENTS, KernelSet
from shardq.kernels.contract import FIGURES
from shardq.kernels.contract_blocks import BLOCK_FORMATS

KINDS = ("plain", "edges", "tiny", "wild")
GROUPS = (1, 7, 8, 16, 31, 32, 100, 256, 5000)
SHAPES = st.tuples(st.integers(1, 4), st.integers(1, 2500))  # a piece has 1024 columns
AT_ENDS = 4  # the figure that values do not have


def error_of(
    kernels: KernelSet, src: NDArray[Any], dtype: str, values: NDArray[np.float32], group: int
) -> NDArray[np.float64]:
    stats = np.full((len(src), FIGURES), -1.0)
    kernels.error_values(src, dtype, values, group, stats)
    return stats


def make_values(make: Make, seed: int, kind: str, shape: tuple[int, int]) -> NDArray[np.float32]:
    """fp32 numbers of a kind, of which runs are zeros of both signs."""
    rng = np.random.default_rng(seed)
    values = make(seed + 1, kind, *shape, "F32").copy()
    runs = np.repeat(rng.random((shape[0], shape[1] // 8 + 1)) < 0.5, 8, axis=1)[:, : shape[1]]
    values[runs] = rng.choice(np.array((0.0, -0.0), np.float32), int(runs.sum()))
    return values


@given(
    seed=st.integers(0, 2**32 - 2),
    kind=st.sampled_from(KINDS),
    values_kind=st.sampled_from(KINDS),
    dtype=st.sampled_from(DTYPES),
    shape=SHAPES,
    group=st.sampled_from(GROUPS),
)
@settings(max_examples=120, deadline=None)
def test_error_of_values_equals_reference(
    kernels: KernelSet,
    reference: KernelSet,
    make_weights: Make,
    same_bits: Check,
    without_nan: WithoutNan,
    seed: int,
    kind: str,
    values_kind: str,
    dtype: str,
    shape: tuple[int, int],
    group: int,
) -> None:
    src, values = make_weights(seed, kind, *shape, dtype), make_values(make_weights, seed, values_kind, shape)
    found, expected = (error_of(k, src, dtype, values, group) for k in (kernels, reference))
    same_bits(without_nan(found), without_nan(expected))
    assert not found[:, AT_ENDS].any()


@given(
    seed=st.integers(0, 2**32 - 1),
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from(DTYPES),
    shape=SHAPES,
    group=st.sampled_from(GROUPS),
    element=st.sampled_from(ELEMENTS),
    scales_kind=st.sampled_from(KINDS),
)
@settings(max_examples=80, deadline=None)
def test_error_is_that_of_the_codes(
    kernels: KernelSet,
    make_weights: Make,
    same_bits: Check,
    without_nan: WithoutNan,
    seed: int,
    kind: str,
    dtype: str,
    shape: tuple[int, int],
    group: int,
    element: str,
    scales_kind: str,
) -> None:
    src = make_weights(seed, kind, *shape, dtype)
    scales = make_weights(seed, scales_kind, shape[0], -(-shape[1] // group), "F32")
    codes = np.random.default_rng(seed).integers(0, 256, shape, np.uint8)
    values, expected = np.empty(shape, np.float32), np.empty((shape[0], FIGURES))
    kernels.decode_scaled(codes, element, scales, group, values)
    kernels.error_scaled(src, dtype, element, codes, scales, group, expected)
    expected[:, AT_ENDS] = 0
    same_bits(without_nan(error_of(kernels, src, dtype, values, group)), without_nan(expected))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", [4, 8, 32, 256])
def test_groups_of_which_no_value_is_left_are_counted(
    kernels: KernelSet, reference: KernelSet, group: int, dtype: str
) -> None:
    """Of a row of six groups, the last one short: one lives, one is lost, one was zero before, one has only its last
    value left, one lost a NaN, and one lost only its last weight."""
    cols = 6 * group - 1
    w, values = np.ones((2, cols), np.float32), np.zeros((2, cols), np.float32)
    values[1] = -0.0
    values[:, 0], values[:, 4 * group - 1] = 1, 1e-45
    w[0, 2 * group : 3 * group], w[1, 2 * group : 3 * group] = 0.0, -0.0
    w[:, 4 * group :] = 0
    w[:, 4 * group + 1], w[:, -1] = np.nan, 2.0**-20
    halves, cut = w.astype(np.float16).view(np.uint16), (w.view(np.uint32) >> 16).astype(np.uint16)
    src: dict[str, NDArray[Any]] = {"F32": w, "F16": halves, "BF16": cut}
    for each in (kernels, reference):
        assert error_of(each, src[dtype], dtype, values, group)[:, 5].tolist() == [3, 3]


def test_the_largest_difference_may_be_in_any_column(kernels: KernelSet) -> None:
    for cols in (1, 2, 127, 1024, 1025, 2051):
        for column in {0, cols // 2, cols - 1}:
            src, values = np.ones((1, cols), np.float32), np.ones((1, cols), np.float32)
            values[0, column] = 4
            assert error_of(kernels, src, "F32", values, 32).tolist() == [[9, cols, 3, -3, 0, 0]]


@pytest.mark.parametrize("name", BLOCK_FORMATS)
def test_error_of_blocks_does_not_depend_on_the_tile(
    kernels: KernelSet, block_data: ModuleType, same_bits: Check, name: str
) -> None:
    """A row with a NaN, whose block is lost, leaves the figures of the others as they are."""
    form, w = BLOCK_FORMATS[name], block_data.bell(3).copy()
    w[1, 5] = np.nan
    blocks = np.empty((len(w), w.shape[1] // form.cols * form.size_bytes), np.uint8)
    values = np.empty_like(w)
    assert kernels.quantize_blocks(w, "F32", name, None, blocks) == 1
    kernels.dequantize_blocks(blocks, name, values)
    stats = error_of(kernels, w, "F32", values, form.cols)
    assert np.isnan(stats).sum(1).tolist() == [4 if row == 1 else 0 for row in range(len(w))]
    assert stats[:, 5].tolist() == [int(row == 1) for row in range(len(w))]
    difference = (w - values)[0].astype(np.float64)
    assert np.isclose(stats[0, 0], (difference**2).sum(), rtol=1e-6)
    alone = [error_of(kernels, w[row : row + 1], "F32", values[row : row + 1], form.cols) for row in range(len(w))]
    same_bits(np.concatenate(alone), stats)


def test_error_of_values_does_not_depend_on_the_mode_of_the_thread(kernels: KernelSet) -> None:
    torch = pytest.importorskip("torch")
    src, values = np.full((1, 300), 1e-39, np.float32), np.full((1, 300), 4e-39, np.float32)
    expected = error_of(kernels, src, "F32", values, 32)
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot flush subnormal numbers")
    try:
        found = error_of(kernels, src, "F32", values, 32)
    finally:
        torch.set_flush_denormal(False)
    assert found[0, 2] == expected[0, 2] > 0
