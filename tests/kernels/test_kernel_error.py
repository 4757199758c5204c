"""Dequantization and error figures."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import Check, Make
from numpy.typing import NDArray

from shardq.kernels import DTYPES, KernelSet
from shardq.kernels.contract import FIGURES

Codes = tuple[NDArray[np.uint8], NDArray[np.float32], NDArray[np.uint8]]  # codes, scales, zeros


def make_codes(seed: int, rows: int, cols: int, group: int, scale_bits: int) -> Codes:
    """Random codes and zeros, and signed scales whose significands have at most `scale_bits` bits."""
    rng = np.random.default_rng(seed)
    shape = (rows, -(-cols // group))
    scales = (rng.standard_normal(shape) * 10.0 ** rng.integers(-6, 3)).astype(np.float32)
    scales = (scales.view(np.uint32) & np.uint32(2**32 - 2 ** (24 - scale_bits))).view(np.float32)
    return rng.integers(0, 256, (rows, cols), np.uint8), scales, rng.integers(0, 256, shape, np.uint8)


def error_of(
    kernels: KernelSet, src: NDArray[Any], dtype: str, group: int, q: Codes, bits: int = 8
) -> NDArray[np.float64]:
    stats = np.full((src.shape[0], FIGURES), -1.0)
    kernels.error_int(src, dtype, bits, *q, group, stats)
    return stats


@given(
    seed=st.integers(0, 2**32 - 1),
    kind=st.sampled_from(("plain", "edges", "tiny", "wild")),
    dtype=st.sampled_from(DTYPES),
    shape=st.tuples(st.integers(1, 4), st.integers(1, 1500)),
    group=st.sampled_from((1, 7, 16, 32, 64, 100, 128, 2000)),
    scale_bits=st.sampled_from((8, 11, 16, 17, 24)),
    bits=st.integers(2, 8),
)
@settings(max_examples=120, deadline=None)
def test_error_and_values_equal_reference(
    kernels: KernelSet,
    reference: KernelSet,
    make_weights: Make,
    same_bits: Check,
    seed: int,
    kind: str,
    dtype: str,
    shape: tuple[int, int],
    group: int,
    scale_bits: int,
    bits: int,
) -> None:
    src = make_weights(seed, kind, *shape, dtype)
    q = make_codes(seed, *shape, group, scale_bits)
    values, expected = np.empty(shape, np.float32), np.empty(shape, np.float32)
    kernels.dequantize_int(*q, group, values)
    reference.dequantize_int(*q, group, expected)
    same_bits(values, expected)
    with np.errstate(all="ignore"):
        found, wanted = (error_of(k, src, dtype, group, q, bits) for k in (kernels, reference))
    same_bits(np.isnan(found), np.isnan(wanted))
    same_bits(np.nan_to_num(found, nan=0.0, posinf=-1.0), np.nan_to_num(wanted, nan=0.0, posinf=-1.0))


@pytest.mark.parametrize("scale", [1e-38, 1e-45, 3e36, 3e38])
def test_error_with_scales_at_the_ends_of_fp32(
    kernels: KernelSet, reference: KernelSet, same_bits: Check, scale: float
) -> None:
    codes = np.random.default_rng(0).integers(0, 256, (1, 256), np.uint8)
    src = np.full((1, 256), -scale * 2 if scale < 1 else scale / 2, np.float32)
    q = (codes, np.full((1, 2), scale, np.float32), np.full((1, 2), 128, np.uint8))
    same_bits(error_of(kernels, src, "F32", 128, q), error_of(reference, src, "F32", 128, q))


def test_error_is_near_float64(kernels: KernelSet, make_weights: Make) -> None:
    src = make_weights(3, "plain", 8, 4096, "F32")
    codes, scales, zeros = np.empty(src.shape, np.uint8), np.empty((8, 32), np.float32), np.empty((8, 32), np.uint8)
    kernels.rtn_int(src, "F32", 4, 128, False, codes, scales, zeros)
    values = np.empty(src.shape, np.float32)
    kernels.dequantize_int(codes, scales, zeros, 128, values)
    stats = error_of(kernels, src, "F32", 128, (codes, scales, zeros))
    difference = src.astype(np.float64) - values
    assert np.allclose(stats[:, 0], (difference**2).sum(1), rtol=1e-6)
    assert np.allclose(stats[:, 1], (src.astype(np.float64) ** 2).sum(1), rtol=1e-6)
    assert np.allclose(stats[:, 2], np.abs(difference).max(1), rtol=1e-6)
    assert (stats[:, 2] <= np.abs(scales).max(1) * 0.5001).all()
    assert np.allclose(stats[:, 3], (src * difference).sum(1), rtol=1e-4, atol=1e-6)


def test_codes_at_the_ends_of_their_range_are_counted(kernels: KernelSet, reference: KernelSet) -> None:
    rng = np.random.default_rng(1)
    for cols in (1, 7, 63, 64, 65, 500, 64 * 255, 64 * 256 + 70):
        codes, src = rng.integers(0, 16, (2, cols), np.uint8), np.ones((2, cols), np.float32)
        codes[0] = 15  # more than a byte counts
        q = (codes, np.ones((2, 1), np.float32), np.zeros((2, 1), np.uint8))
        for each in (kernels, reference):
            for bits in (2, 3, 4, 5):
                at_ends = (codes == 0) | (codes >= 2**bits - 1)
                assert error_of(each, src, "F32", cols, q, bits)[:, 4].tolist() == at_ends.sum(1).tolist()


@pytest.mark.parametrize("group", [4, 8, 32, 128])
def test_groups_of_which_nothing_is_left_are_counted(kernels: KernelSet, reference: KernelSet, group: int) -> None:
    """Of a row of six groups: one lives, one is lost, one was zero before, one has only its last weight left, one has
    no scale, and one a scale that makes every product zero."""
    codes, zeros = np.full((3, 6 * group), 8, np.uint8), np.full((3, 6), 8, np.uint8)
    scales, src = np.ones((3, 6), np.float32), np.full((3, 6 * group), 1e-3, np.float32)
    codes[:, 0] = 9
    src[:, 2 * group : 3 * group] = [[0.0], [-0.0], [0.0]]
    codes[:, 4 * group - 1] = 7
    scales[:, 4], codes[:, 4 * group : 5 * group] = 0, np.arange(group) % 16
    scales[:, 5], codes[:, 5 * group :] = 1e-45, 7
    src[1, 2 * group + 1] = 1e-45  # a weight, though a small one
    for each in (kernels, reference):
        found = error_of(each, src, "F32", group, (codes, scales, zeros), 4)
        assert found[:, 5].tolist() == [2, 3, 2]
    values = np.empty(src.shape, np.float32)
    kernels.dequantize_int(codes, scales, zeros, group, values)
    assert (values[:, 5 * group :] != 0).all()  # 1e-45 is the smallest number, and nothing is lost by a whole factor


@pytest.mark.parametrize("element", ["e2m1", "e4m3fn", "int4"])
def test_scales_that_make_products_zero_lose_a_group(kernels: KernelSet, reference: KernelSet, element: str) -> None:
    """Codes of one half, or less, and of zero with both signs: not all equal, and yet all zero under such a scale."""
    codes = np.tile(np.array([1, 0, 8, 0x81], np.uint8), (1, 8)) if element != "int4" else np.full((1, 32), 8, np.uint8)
    src, stats = np.full((1, 32), 1e-44, np.float32), np.empty((1, FIGURES))
    for scale, lost in ((1e-45, 2), (0.0, 2), (1.0, 0 if element != "int4" else 2)):
        for each in (kernels, reference):
            each.error_scaled(src, "F32", element, codes, np.full((1, 2), scale, np.float32), 16, stats)
            assert stats[0, 5] == lost


@pytest.mark.parametrize("element", ["e0m3", "e2m1", "e2m3", "e3m2", "e4m3fn", "e5m2"])
def test_the_largest_codes_of_floats_are_at_an_end(kernels: KernelSet, element: str) -> None:
    codes = np.arange(256, dtype=np.uint8).reshape(1, -1)
    values, stats, one = np.empty((1, 256), np.float32), np.empty((1, FIGURES)), np.ones((1, 1), np.float32)
    kernels.decode_scaled(codes, element, one, 256, values)
    kernels.error_scaled(values, "F32", element, codes, one, 256, stats)
    finite = np.abs(values[np.isfinite(values)])
    assert stats[0, 4] == (~np.isfinite(values)).sum() + (finite == finite.max()).sum()
