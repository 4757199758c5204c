"""Dequantization and error figures."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from shardq.kernels import DTYPES, KernelSet

Check = Callable[[NDArray[Any], NDArray[Any]], None]
Make = Callable[[int, str, int, int, str], NDArray[Any]]


Codes = tuple[NDArray[np.uint8], NDArray[np.float32], NDArray[np.uint8]]  # codes, scales, zeros


def make_codes(seed: int, rows: int, cols: int, group: int, scale_bits: int) -> Codes:
    """Random codes and zeros, and signed scales whose significands have at most `scale_bits` bits."""
    rng = np.random.default_rng(seed)
    shape = (rows, -(-cols // group))
    scales = (rng.standard_normal(shape) * 10.0 ** rng.integers(-6, 3)).astype(np.float32)
    scales = (scales.view(np.uint32) & np.uint32(2**32 - 2 ** (24 - scale_bits))).view(np.float32)
    return rng.integers(0, 256, (rows, cols), np.uint8), scales, rng.integers(0, 256, shape, np.uint8)


def error_of(kernels: KernelSet, src: NDArray[Any], dtype: str, group: int, q: Codes) -> NDArray[np.float64]:
    stats = np.full((src.shape[0], 3), -1.0)
    kernels.error_int(src, dtype, *q, group, stats)
    return stats


@given(
    seed=st.integers(0, 2**32 - 1),
    kind=st.sampled_from(("plain", "edges", "tiny", "wild")),
    dtype=st.sampled_from(DTYPES),
    shape=st.tuples(st.integers(1, 4), st.integers(1, 1500)),
    group=st.sampled_from((1, 7, 16, 32, 64, 100, 128, 2000)),
    scale_bits=st.sampled_from((8, 11, 16, 17, 24)),
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
) -> None:
    src = make_weights(seed, kind, *shape, dtype)
    q = make_codes(seed, *shape, group, scale_bits)
    values, expected = np.empty(shape, np.float32), np.empty(shape, np.float32)
    kernels.dequantize_int(*q, group, values)
    reference.dequantize_int(*q, group, expected)
    same_bits(values, expected)
    with np.errstate(all="ignore"):
        found, wanted = error_of(kernels, src, dtype, group, q), error_of(reference, src, dtype, group, q)
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
