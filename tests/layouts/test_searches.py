"""Searched scales in the arithmetic of every layout: never worse than round-to-nearest, and the same in torch."""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from shardq.errors import BadOption
from shardq.figures import FIGURES, WEIGHED
from shardq.kernels import KernelSet, load
from shardq.layouts import find_layout
from shardq.quantizers.buffers import Buffers, buffer_shapes
from shardq.quantizers.decode import decode_rows
from shardq.quantizers.quantized import Quantized
from shardq.quantizers.rtn import measure_rows, quantize_rows
from shardq.schemes import Scheme, parse_scheme
from shardq.search import Search, default_search, kind_of

CASES = (
    "W2A16G32@auto_round",
    "W3A16@gptq",
    "W4A16@auto_round",
    "W4A16@compressed-tensors",
    "W4A16_ASYM@auto_round",
    "W4A16_ASYM@compressed-tensors",
    "W4A16_ASYM@awq",
    "W8A8@compressed-tensors",
    "2BIT@mlx",
    "4BIT@mlx",
    "MXFP4@compressed-tensors",
    "MXFP4@auto_round",
    "MXFP4@mlx",
    "MXFP6A16@compressed-tensors",
    "MXFP8@compressed-tensors",
    "MXFP8@fp8",
    "MXFP8@mlx",
    "MXINT4@auto_round",
    "NVFP4A16@compressed-tensors",
    "NVFP4A16@mlx",
    "NVFP4_E5M3@auto_round",
)
ROWS, COLUMNS = 37, 768


def scheme_of(case: str) -> Scheme:
    name, _, layout = case.partition("@")
    return find_layout(layout).settle(parse_scheme(name).scheme)


def source(seed: int) -> tuple[NDArray[np.uint16], NDArray[np.float32], NDArray[np.float32]]:
    """bf16 weights with a few large columns, as raw bits and as numbers, and importance."""
    rng = np.random.default_rng(seed)
    w = (rng.standard_normal((ROWS, COLUMNS)) * 0.02).astype(np.float32)
    w[:, ::97] *= 12
    w[3, :256] = 0
    raw = (w.view(np.uint32) >> 16).astype(np.uint16)
    importance = (rng.standard_normal(COLUMNS) ** 2 + 0.01).astype(np.float32)
    return raw, (raw.astype(np.uint32) << 16).view(np.float32), importance


def quantized(
    raw: NDArray[Any], scheme: Scheme, kernels: KernelSet, search: Search | None, importance: NDArray[np.float32] | None
) -> tuple[Quantized, NDArray[np.float64], NDArray[np.float64], int]:
    """Result, stats, losses, bad groups; all arrays are the caller's."""
    buffers = Buffers(*(np.zeros(shape, kind) for shape, kind in buffer_shapes(*raw.shape, scheme)))
    stats, losses = np.empty((len(raw), FIGURES)), np.zeros((len(raw), WEIGHED))
    amax = None if scheme.reach == "group" else 0.9
    found, bad = quantize_rows(
        raw, "BF16", scheme, buffers, stats, kernels, amax, None, search, importance, losses
    )  # fmt: skip
    return found, stats, losses, bad


def weighted_errors(q: Quantized, w: NDArray[np.float32], scheme: Scheme, e: NDArray[np.float32]) -> NDArray[Any]:
    """Of every group, in double."""
    squares = e * (w - decode_rows(q, scheme, load("reference"))).astype(np.float64) ** 2
    return np.add.reduceat(squares, np.arange(0, COLUMNS, scheme.group_columns(COLUMNS)), axis=1)


@pytest.mark.parametrize("case", CASES)
def test_no_group_is_worse_than_rounded_to_nearest(case: str) -> None:
    scheme = scheme_of(case)
    raw, w, importance = source(1)
    search = default_search(scheme, weighted=True)
    assert search is not None
    plain, *_ = quantized(raw, scheme, load(), None, None)
    found, stats, losses, bad = quantized(raw, scheme, load(), search, importance)
    before, after = (weighted_errors(q, w, scheme, importance) for q in (plain, found))
    assert bad == 0
    assert (after <= before * (1 + 1e-5)).all()
    assert after.sum() <= before.sum() * (1 if scheme.bits > 4 else 0.97)  # MXFP8 gains where scales saturate only
    np.testing.assert_allclose(losses[:, 1], after.sum(1), rtol=1e-4, atol=1e-12)
    again = np.empty_like(stats)
    measure_rows(raw, "BF16", scheme, found, again, load())
    assert np.array_equal(stats, again)


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_the_reference_finds_the_same(case: str, weighted: bool) -> None:
    scheme = scheme_of(case)
    raw, _, importance = source(2)
    search, e = default_search(scheme, weighted), importance if weighted else None
    found, expected = (quantized(raw[:5], scheme, k, search, e) for k in (load(), load("reference")))
    assert np.array_equal(found[0].codes, expected[0].codes)
    assert np.array_equal(found[0].scales, expected[0].scales)
    for a, b in ((found[0].zeros, expected[0].zeros), (found[0].biases, expected[0].biases)):
        assert (a is None and b is None) or np.array_equal(a, b)  # type: ignore[arg-type]
    assert np.array_equal(found[1], expected[1])
    assert np.array_equal(found[2], expected[2])


@pytest.mark.parametrize("case", CASES)
def test_groups_without_numbers_are_counted_as_without_a_search(case: str) -> None:
    scheme = scheme_of(case)
    raw, _, importance = source(3)
    raw[2, 100], raw[7, 500] = 0x7FC0, 0xFF80
    with np.errstate(all="ignore"):
        plain = quantized(raw, scheme, load(), None, None)
        found = quantized(raw, scheme, load(), default_search(scheme, True), importance)
    assert plain[3] == found[3] > 0


@pytest.mark.parametrize("name", ["FP8_BLOCK@compressed-tensors", "FP8_DYNAMIC@compressed-tensors"])
def test_other_schemes_have_nothing_to_search(name: str) -> None:
    scheme = scheme_of(name)
    assert kind_of(scheme) is None
    assert default_search(scheme, True) is None
    with pytest.raises(ValueError, match="nothing to search"):
        quantized(source(4)[0], scheme, load(), Search(0.5, 2, 3, 0), None)


def test_factors_hold_one_and_reach_from_end_to_end() -> None:
    for case in CASES:
        search = default_search(scheme_of(case), True)
        assert search is not None
        for logarithmic in (True, False):
            factors = search.factors(logarithmic)
            assert len(factors) == search.candidates
            assert 1.0 in factors
            assert sorted(factors) == list(factors)
    assert Search(0.5, 2, 1, 0).factors(True) == (1.0,)
    assert Search(0.5, 2.0, 3, 0).factors(True) == (0.5, 1.0, 2.0)


@pytest.mark.parametrize("values", [(0, 2, 9, 2), (1.1, 2, 9, 2), (0.5, 0.9, 9, 2), (0.5, 2, 0, 2), (0.5, 2, 9, 65)])
def test_impossible_searches_are_refused(values: tuple[float, float, int, int]) -> None:
    with pytest.raises(BadOption, match="is impossible"):
        Search(*values)
