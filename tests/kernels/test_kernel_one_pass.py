"""Kernels that do two steps in one pass, against the two steps."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import KINDS, Check, Make
from numpy.typing import NDArray

from shardq.kernels import DTYPES, KernelSet
from shardq.kernels.contract import FIGURES


def check_both_ways(
    kernels: KernelSet, src: NDArray[Any], dtype: str, bits: int, group: int, symmetric: bool, same_bits: Check
) -> int:
    """Compares rtn_error_int with rtn_int and error_int, NaN for NaN; the number of bad groups."""
    rows, cols = src.shape
    shape = (2, rows, -(-cols // group))
    codes, zeros = np.full((2, rows, cols), 255, np.uint8), np.full(shape, 255, np.uint8)
    scales, stats = np.full(shape, np.nan, np.float32), np.full((2, rows, FIGURES), -1.0)
    bad = kernels.rtn_int(src, dtype, bits, group, symmetric, codes[0], scales[0], zeros[0])
    kernels.error_int(src, dtype, bits, codes[0], scales[0], zeros[0], group, stats[0])
    found = kernels.rtn_error_int(src, dtype, bits, group, symmetric, codes[1], scales[1], zeros[1], stats[1])
    assert found == bad
    for each in (scales, zeros, codes):
        same_bits(each[1], each[0])
    same_bits(np.isnan(stats[1]), np.isnan(stats[0]))
    same_bits(np.nan_to_num(stats[1], nan=-2.0), np.nan_to_num(stats[0], nan=-2.0))
    return bad


def _stored(w: NDArray[np.float32], dtype: str) -> NDArray[Any]:
    """As kernels take weights of a type; BF16 loses its last digits."""
    match dtype:
        case "F32":
            return w
        case "F16":
            return w.astype(np.float16).view(np.uint16)
        case _:
            return (w.view(np.uint32) >> 16).astype(np.uint16)


@given(
    seed=st.integers(0, 2**32 - 1),
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from(DTYPES),
    rows=st.integers(1, 4),
    cols=st.one_of(st.integers(1, 3000), st.integers(1, 40).map(lambda blocks: 128 * blocks)),
    bits=st.integers(2, 8),
    group=st.sampled_from((1, 7, 16, 31, 32, 64, 100, 128, 256, 384, 2048, 2176, 2**40)),
    symmetric=st.booleans(),
)
@settings(max_examples=250, deadline=None)
def test_rounding_with_its_error_equals_the_two_kernels(
    kernels: KernelSet,
    make_weights: Make,
    same_bits: Check,
    seed: int,
    kind: str,
    dtype: str,
    rows: int,
    cols: int,
    bits: int,
    group: int,
    symmetric: bool,
) -> None:
    src = make_weights(seed, kind, rows, cols, dtype)
    check_both_ways(kernels, src, dtype, bits, min(group, cols), symmetric, same_bits)


@pytest.mark.parametrize("group", [32, 64, 128, 512, 4096])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_width_of_the_one_pass_equals_the_two_kernels(
    kernels: KernelSet, make_weights: Make, same_bits: Check, kind: str, dtype: str, group: int
) -> None:
    for symmetric in (True, False):
        for bits in (2, 4, 8):
            check_both_ways(
                kernels, make_weights(bits, kind, 3, 4096 + 224, dtype), dtype, bits, group, symmetric, same_bits
            )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("symmetric", [True, False])
def test_ties_and_codes_beyond_the_range_round_as_in_rtn_int(
    kernels: KernelSet, same_bits: Check, dtype: str, symmetric: bool
) -> None:
    """All multiples of a quarter of a scale that has few bits, up to and beyond the last code, in every group."""
    rng = np.random.default_rng(5)
    levels = np.arange(-64, 65, dtype=np.float32)[rng.integers(0, 129, (64, 512))] / 4
    levels[:, ::32] = np.where(rng.random((64, 16)) < 0.5, -16.0, 15.75)
    w = (levels * rng.choice(np.array([0.125, 0.75, 1.25, 5.5], np.float32), (64, 1))).astype(np.float32)
    src = _stored(w, dtype)
    for group in (32, 128):
        for bits in (4, 5):
            assert check_both_ways(kernels, src, dtype, bits, group, symmetric, same_bits) == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("symmetric", [True, False])
def test_weights_at_and_beside_half_way_points_round_as_in_rtn_int(
    kernels: KernelSet, same_bits: Check, dtype: str, symmetric: bool
) -> None:
    """Each row is a group of 128 whose first two weights make the scale; symmetric ones give every significand."""
    rng = np.random.default_rng(9)
    ends = rng.uniform(1, 2, (2048, 2)).astype(np.float32) * np.array([0.8, -1], np.float32)
    steps: NDArray[Any] = np.abs(ends[:, 1:]) / 8 if symmetric else (ends[:, :1] - ends[:, 1:]) / 15
    for _ in range(2):  # the second time with the scales that the first one gave
        halves = (np.arange(-7, 6, dtype=np.float32) + np.float32(0.5))[None, :] * steps
        near = np.concatenate([ends, halves], axis=1).astype(np.float32)
        raw = _stored(near, dtype)
        words = raw.view(np.uint32 if dtype == "F32" else np.uint16)
        beside = [words[:, 2:] + words.dtype.type(offset) for offset in (-1 % 2 ** (8 * words.itemsize), 0, 1)]
        src = np.concatenate([words[:, :2], *beside, np.zeros((2048, 128 - 41), words.dtype)], axis=1).view(raw.dtype)
        codes, zeros = np.empty(src.shape, np.uint8), np.empty((2048, 1), np.uint8)
        scales = np.empty((2048, 1), np.float32)
        assert kernels.rtn_int(src, dtype, 4, 128, symmetric, codes, scales, zeros) == 0
        check_both_ways(kernels, src, dtype, 4, 128, symmetric, same_bits)
        steps = np.abs(scales)


@pytest.mark.parametrize("value", [np.nan, -np.inf, 3e38])
def test_a_bad_group_shows_in_the_figures_of_its_row_alone(kernels: KernelSet, same_bits: Check, value: float) -> None:
    w = np.full((3, 512), 0.25, np.float32)
    w[1, 200] = value
    src = (w.view(np.uint32) >> 16).astype(np.uint16)
    assert check_both_ways(kernels, src, "BF16", 4, 128, True, same_bits) == 1
    codes, scales, zeros = np.empty((3, 512), np.uint8), np.empty((3, 4), np.float32), np.empty((3, 4), np.uint8)
    stats = np.empty((3, FIGURES))
    assert kernels.rtn_error_int(src, "BF16", 4, 128, True, codes, scales, zeros, stats) == 1
    assert not np.isfinite(stats[1, 0])
    assert np.isfinite(stats[[0, 2]]).all()
    assert (codes[1, 128:256] == 8).all()
    assert stats[:, 5].tolist() == [0, 1, 0]


@given(
    seed=st.integers(0, 2**32 - 1),
    bits=st.integers(2, 8),
    rows=st.integers(1, 70),
    words=st.integers(1, 70),
    before=st.integers(0, 20),
    after=st.integers(0, 20),
)
@settings(max_examples=100, deadline=None)
def test_packing_columns_equals_packing_and_transposing(
    kernels: KernelSet,
    reference: KernelSet,
    same_bits: Check,
    seed: int,
    bits: int,
    rows: int,
    words: int,
    before: int,
    after: int,
) -> None:
    rng = np.random.default_rng(seed)
    step = 32 // np.gcd(bits, 32)
    cols = int(-(-words * 32 // bits // step) * step)
    codes = rng.integers(0, 256, (rows, cols), np.uint8)  # the bits above `bits` must not count
    packed = np.empty((rows, cols * bits // 32), np.uint32)
    kernels.pack_bits(codes, bits, packed)
    start = rng.integers(0, 2**32, (packed.shape[1], before + rows + after), np.uint32)
    expected = start.copy()
    kernels.transpose_u32(packed, expected, before)
    for each in (kernels, reference):
        found = start.copy()
        each.pack_columns(codes, bits, found, before)
        same_bits(found, expected)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
def test_packed_columns_of_many_strips_come_back(kernels: KernelSet, same_bits: Check, bits: int) -> None:
    codes = np.random.default_rng(bits).integers(0, 2**bits, (48, 2048 + 32), np.uint8)
    out = np.empty((codes.shape[1] * bits // 32, 48), np.uint32)
    kernels.pack_columns(codes, bits, out, 0)
    back = np.empty_like(codes)
    kernels.unpack_bits(np.ascontiguousarray(out.T), bits, back)
    same_bits(back, codes)
