"""rtn_int against the torch reference and against an independent numpy typing of the published formula."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import KINDS, Check, Make
from numpy.typing import NDArray

from shardq.kernels import DTYPES, KernelSet


def run(
    kernels: KernelSet, src: NDArray[Any], dtype: str, bits: int, group: int, symmetric: bool
) -> tuple[NDArray[np.uint8], NDArray[np.float32], NDArray[np.uint8], int]:
    rows, cols = src.shape
    groups = -(-cols // group)
    codes = np.full((rows, cols), 255, np.uint8)
    scales = np.full((rows, groups), np.nan, np.float32)
    zeros = np.full((rows, groups), 255, np.uint8)
    bad = kernels.rtn_int(src, dtype, bits, group, symmetric, codes, scales, zeros)
    return codes, scales, zeros, bad


def compare(found: tuple[Any, ...], expected: tuple[Any, ...], check: Check) -> None:
    check(found[1], expected[1])
    check(found[2], expected[2])
    check(found[0], expected[0])
    assert found[3] == expected[3]


@given(
    seed=st.integers(0, 2**32 - 1),
    kind=st.sampled_from(KINDS),
    shape=st.tuples(st.integers(1, 5), st.integers(1, 700)),
    dtype=st.sampled_from(DTYPES),
    bits=st.integers(2, 8),
    group=st.sampled_from((1, 2, 5, 8, 16, 24, 31, 32, 33, 64, 100, 120, 128, 256, 5000)),
    symmetric=st.booleans(),
)
@settings(max_examples=250, deadline=None)
def test_rtn_equals_reference(
    kernels: KernelSet,
    reference: KernelSet,
    make_weights: Make,
    same_bits: Check,
    seed: int,
    kind: str,
    shape: tuple[int, int],
    dtype: str,
    bits: int,
    group: int,
    symmetric: bool,
) -> None:
    src = make_weights(seed, kind, *shape, dtype)
    expected = run(reference, src, dtype, bits, group, symmetric)
    compare(run(kernels, src, dtype, bits, group, symmetric), expected, same_bits)


@pytest.mark.parametrize("group", [32, 128, 4100, 9000])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rtn_equals_reference_on_wide_rows(
    kernels: KernelSet, reference: KernelSet, make_weights: Make, same_bits: Check, dtype: str, group: int
) -> None:
    src = make_weights(7, "plain", 3, 8999, dtype)
    for symmetric in (True, False):
        expected = run(reference, src, dtype, 4, group, symmetric)
        compare(run(kernels, src, dtype, 4, group, symmetric), expected, same_bits)


def int_rtn(w: NDArray[np.float32], bits: int, symmetric: bool) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """[groups, columns] to codes, scales, zeros: auto-round 0.16.1 model-free, with the zero clamped before use."""
    mx, mn = np.maximum(w.max(-1), np.float32(0)), np.minimum(w.min(-1), np.float32(0))
    smallest = np.float16(1e-5)
    if symmetric:
        maxq = 1 << (bits - 1)
        extreme = np.where(mx < -mn, np.float32(1), np.float32(-1)) * np.maximum(mx, -mn)
        s = (extreme / np.float32(maxq)).astype(np.float16)
        s = np.where(s < 0, np.minimum(s, -smallest), np.maximum(s, smallest)).astype(np.float32)
        codes = np.clip(np.rint(w / s[:, None]), -maxq, maxq - 1) + maxq
        return codes.astype(np.uint8), s, np.full(s.shape, maxq, np.uint8)
    maxq = (1 << bits) - 1
    s = np.maximum(((mx - mn) / np.float32(maxq)).astype(np.float16), smallest).astype(np.float32)
    zeros = np.clip(np.rint(-mn / s), 0, maxq)
    codes = np.clip(np.rint(w / s[:, None]) + zeros[:, None], 0, maxq)
    return codes.astype(np.uint8), s, zeros.astype(np.uint8)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("kind", ["plain", "ties", "tiny"])
def test_rtn_equals_the_published_formula(
    kernels: KernelSet, make_weights: Make, same_bits: Check, kind: str, bits: int, symmetric: bool
) -> None:
    src = make_weights(bits, kind, 64, 1024, "BF16")
    w = (src.astype(np.uint32) << 16).view(np.float32)
    codes, scales, zeros, bad = run(kernels, src, "BF16", bits, 64, symmetric)
    expected = int_rtn(w.reshape(-1, 64), bits, symmetric)
    assert bad == 0
    same_bits(codes.reshape(-1, 64), expected[0])
    same_bits(scales.reshape(-1), expected[1])
    same_bits(zeros.reshape(-1), expected[2])


def widened(patterns: NDArray[np.uint16], dtype: str) -> NDArray[np.float32]:
    if dtype == "F16":
        return patterns.view(np.float16).astype(np.float32)
    return (patterns.astype(np.uint32) << 16).view(np.float32)


def narrowed(values: NDArray[np.float32], dtype: str) -> NDArray[np.uint16]:
    if dtype == "F16":
        return values.astype(np.float16).view(np.uint16)
    return (values.view(np.uint32) >> 16).astype(np.uint16)


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_rtn_divides_truly_at_and_beside_every_half_way_point(
    kernels: KernelSet, same_bits: Check, dtype: str, symmetric: bool, bits: int
) -> None:
    """Each row is a scale, made by its first two columns; the others are the weights nearest to its half-way points."""
    rng = np.random.default_rng(bits)
    ends = narrowed(rng.uniform(1, 4, (1024, 2)).astype(np.float32) * np.array([1, -1], np.float32), dtype)
    scales = int_rtn(widened(ends, dtype), bits, symmetric)[1]
    halves = np.arange(-(2**bits), 2**bits, dtype=np.float32) + np.float32(0.5)
    nearest = narrowed(scales[:, None] * halves, dtype)
    src = np.concatenate([ends, nearest - np.uint16(1), nearest, nearest + np.uint16(1)], axis=1)
    w = widened(src, dtype)
    src[(w > w[:, :1]) | (w < w[:, 1:2])] = 0
    w = widened(src, dtype)
    quotients = w.astype(np.float64) / scales[:, None]
    assert np.count_nonzero(quotients % 1 == 0.5) > (1000 if symmetric else 10)
    codes, found_scales, zeros, bad = run(kernels, src, dtype, bits, src.shape[1], symmetric)
    expected = int_rtn(w, bits, symmetric)
    assert bad == 0
    same_bits(found_scales[:, 0], scales)
    same_bits(zeros[:, 0], expected[2])
    same_bits(codes, expected[0])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3e38])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [32, 128, 7])
def test_bad_group_decodes_to_zero_and_is_counted(
    kernels: KernelSet, value: float, symmetric: bool, group: int
) -> None:
    w = np.full((2, 3 * group), 0.25, np.float32)
    w[1, group + 3] = value
    codes, scales, zeros, bad = run(kernels, w, "F32", 4, group, symmetric)
    assert bad == 1
    assert scales[1, 1] == np.float32(np.float16(1e-5))
    assert zeros[1, 1] == 8
    assert (codes[1, group : 2 * group] == 8).all()
    assert np.isfinite(scales).all()
    assert (codes[0] != 8).all()


def test_largest_scale_that_fp16_holds_is_good(kernels: KernelSet) -> None:
    for value, bad in ((65519.996 * 8, 0), (65520.0 * 8, 1)):
        w = np.full((1, 32), value, np.float32)
        assert run(kernels, w, "F32", 4, 32, True)[3] == bad
