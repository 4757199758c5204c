"""Codes of symmetric elements: natively as in the reference, and as other people's casts have them."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import KINDS, Check, Make
from numpy.typing import NDArray

from shardq.kernels import DTYPES, ELEMENTS, KernelSet
from shardq.kernels.contract import FIGURES

GROUPS = (1, 2, 5, 8, 16, 24, 31, 32, 33, 64, 100, 128, 256, 5000)
SCALE_KINDS = ("absmax", "powers", "ends", "any")
BITS = {"e0m3": 4, "e2m1": 4, "e2m3": 6, "e3m2": 6, "e4m3fn": 8, "e5m2": 8}
BITS |= {f"int{bits}": bits for bits in range(2, 9)}
LARGEST = {"e0m3": 1.75, "e2m1": 6.0, "e2m3": 7.5, "e3m2": 28.0, "e4m3fn": 448.0, "e5m2": 57344.0}
LARGEST |= {f"int{bits}": 2.0 ** (bits - 1) - 0.5 for bits in range(2, 9)}


def make_scales(seed: int, kind: str, src: NDArray[Any], shape: tuple[int, int], element: str) -> NDArray[np.float32]:
    """Scales of many kinds: fitting, powers of two with some zeros, the ends of fp32, any pattern."""
    rng = np.random.default_rng(seed)
    if kind == "any":
        return rng.integers(0, 2**32, shape, np.uint32).view(np.float32)
    if kind == "ends":
        ends = (0.0, -0.0, 1e-45, 2.0**-127, 2.0**-126, 2.0**126, 2.0**127, 3e38, np.inf, -np.inf, np.nan, -1.0)
        return rng.choice(np.array(ends, np.float32), shape)
    if kind == "powers":
        powers = np.exp2(rng.integers(-12, 3, shape)).astype(np.float32)
        return np.where(rng.random(shape) < 0.1, np.float32(0), powers)
    return ((np.abs(rng.standard_normal(shape)) * 0.02 + 0.01) / LARGEST[element]).astype(np.float32)


def encoded(
    kernels: KernelSet, src: NDArray[Any], dtype: str, element: str, group: int, scales: NDArray[np.float32]
) -> NDArray[np.uint8]:
    codes = np.full(src.shape, 0xA5, np.uint8)
    kernels.encode_scaled(src, dtype, element, group, scales, codes)
    return codes


def values_of(kernels: KernelSet, element: str, codes: NDArray[np.uint8]) -> NDArray[np.float32]:
    out = np.empty(codes.shape, np.float32)
    kernels.decode_scaled(codes, element, np.ones((len(codes), 1), np.float32), codes.shape[1], out)
    return out


def without_nan(x: NDArray[Any]) -> NDArray[Any]:
    """Which NaN a result is, is not specified."""
    return np.where(np.isnan(x), x.dtype.type(np.nan), x)


@given(
    seed=st.integers(0, 2**32 - 1),
    kind=st.sampled_from(KINDS),
    scale_kind=st.sampled_from(SCALE_KINDS),
    shape=st.tuples(st.integers(1, 4), st.integers(1, 2100)),
    dtype=st.sampled_from(DTYPES),
    element=st.sampled_from(ELEMENTS),
    group=st.sampled_from(GROUPS),
)
@settings(max_examples=300, deadline=None)
def test_scaled_kernels_equal_reference(
    kernels: KernelSet,
    reference: KernelSet,
    make_weights: Make,
    same_bits: Check,
    seed: int,
    kind: str,
    scale_kind: str,
    shape: tuple[int, int],
    dtype: str,
    element: str,
    group: int,
) -> None:
    src = make_weights(seed, kind, *shape, dtype)
    scales = make_scales(seed, scale_kind, src, (shape[0], -(-shape[1] // group)), element)
    codes = encoded(kernels, src, dtype, element, group, scales)
    same_bits(codes, encoded(reference, src, dtype, element, group, scales))
    if seed % 2:
        codes = np.random.default_rng(seed).integers(0, 256, shape, np.uint8)
    values, stats = np.empty((2, *shape), np.float32), np.full((2, shape[0], FIGURES), -1.0)
    with np.errstate(all="ignore"):
        for i, each in enumerate((kernels, reference)):
            each.decode_scaled(codes, element, scales, group, values[i])
            each.error_scaled(src, dtype, element, codes, scales, group, stats[i])
    same_bits(without_nan(values[0]), without_nan(values[1]))
    same_bits(without_nan(stats[0]), without_nan(stats[1]))


def test_small_floats_are_those_of_their_tables(kernels: KernelSet) -> None:
    every = np.arange(64, dtype=np.uint8).reshape(1, -1)
    names = ("e0m3", "e2m1", "e2m3", "e3m2")
    e0m3, e2m1, e2m3, e3m2 = (values_of(kernels, element, every)[0].tolist() for element in names)
    assert e0m3[:16] == [0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75, 0, -0.25, -0.5, -0.75, -1, -1.25, -1.5, -1.75]
    assert e2m1[:8] == [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert e2m1[8:16] == [-x for x in e2m1[:8]]
    assert e2m1[16:32] == e2m1[:16]
    assert [e2m3[code] for code in (1, 7, 8, 9, 16, 24, 31, 63)] == [0.125, 0.875, 1, 1.125, 2, 4, 7.5, -7.5]
    assert [e3m2[code] for code in (1, 3, 4, 5, 12, 28, 31, 63)] == [0.0625, 0.1875, 0.25, 0.3125, 1, 16, 28, -28]


@pytest.mark.parametrize(("element", "dtype"), [("e4m3fn", torch.float8_e4m3fn), ("e5m2", torch.float8_e5m2)])
def test_8_bit_floats_are_those_of_torch(
    kernels: KernelSet, same_bits: Check, element: str, dtype: torch.dtype
) -> None:
    rng = np.random.default_rng(1)
    every = np.arange(256, dtype=np.uint8).reshape(1, -1)
    same_bits(
        without_nan(values_of(kernels, element, every)),
        without_nan(torch.from_numpy(every).view(dtype).float().numpy()),
    )
    numbers = np.sort(values_of(kernels, element, every)[0])
    numbers = numbers[np.isfinite(numbers)]
    halves = (numbers[1:] + numbers[:-1]) / 2
    beside = np.concatenate([numbers, *(np.nextafter(halves, np.float32(d)) for d in (-np.inf, np.inf)), halves])
    w = np.concatenate([beside, rng.standard_normal(20000) * 2.0 ** rng.integers(-20, 18, 20000)]).astype(np.float32)
    codes = encoded(kernels, w.reshape(1, -1), "F32", element, w.size, np.ones((1, 1), np.float32))
    limit = LARGEST[element]
    same_bits(codes[0], torch.from_numpy(w + np.float32(0)).clamp(-limit, limit).to(dtype).view(torch.uint8).numpy())


@pytest.mark.parametrize("group", [31, 32, 64, 100, 128, 1000])
def test_numbers_of_e4m3_by_any_scale_equal_reference(
    kernels: KernelSet, reference: KernelSet, same_bits: Check, group: int
) -> None:
    """Without NaN, after which whole groups are no longer decoded at once; products below, in and beyond fp32."""
    rng = np.random.default_rng(group)
    codes = rng.integers(0, 127, (64, 1000), np.uint8) | rng.choice(np.array([0, 128], np.uint8), (64, 1000))
    shape = (64, -(-1000 // group))
    scales = np.ldexp(rng.uniform(-2, 2, shape), rng.integers(-149, 128, shape)).astype(np.float32)
    scales[0] = 2.0**119  # 256 times it is the largest power of two
    found = np.empty((2, *codes.shape), np.float32)
    with np.errstate(all="ignore"):
        for out, each in zip(found, (kernels, reference), strict=True):
            each.decode_scaled(codes, "e4m3fn", scales, group, out)
    same_bits(without_nan(found[0]), without_nan(found[1]))


@pytest.mark.parametrize("element", ELEMENTS)
def test_every_bf16_weight_gets_the_nearest_element(kernels: KernelSet, element: str) -> None:
    """Among all elements, by distance; of two as near, the even code. Weights that round to zero keep their sign, those
    that are -0 only in six bits."""
    patterns = np.arange(2**16, dtype=np.uint16).reshape(1, -1)
    scale = np.float32(0.0123)
    codes = encoded(kernels, patterns, "BF16", element, 2**16, np.array([[scale]]))[0]
    numbers = values_of(kernels, element, np.arange(2 ** BITS[element], dtype=np.uint8).reshape(1, -1))[0]
    known = np.flatnonzero(np.isfinite(numbers) & ~((numbers == 0) & np.signbit(numbers)))
    order = known[np.argsort(numbers[known])]
    w = (patterns[0].astype(np.uint32) << 16).view(np.float32)
    with np.errstate(all="ignore"):
        v = np.nan_to_num(w / scale, posinf=1e30, neginf=-1e30).astype(np.float64)
    v = v.clip(numbers[order[0]], numbers[order[-1]])
    above = np.searchsorted(numbers[order], v).clip(1, len(order) - 1)
    low, high = order[above - 1], order[above]
    to_low, to_high = v - numbers[low], numbers[high] - v
    nearest = np.where((to_low < to_high) | ((to_low == to_high) & (low % 2 == 0)), low, high)
    if element.startswith("e"):
        is_negative_zero = (numbers[nearest] == 0) & ((v < 0) | (np.signbit(v) & (BITS[element] == 6)))
        nearest = np.where(is_negative_zero, 2 ** (BITS[element] - 1), nearest)
    assert np.array_equal(codes, nearest.astype(np.uint8))


@pytest.mark.parametrize("scale", [1.0, 3.0])  # multiplied, and divided
def test_halves_go_to_the_even_code_and_zeros_keep_their_sign(kernels: KernelSet, scale: float) -> None:
    v = np.array([[0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, 7, -0.25, -2.5, -0.0, 1e-30, -1e-30]], np.float32)
    codes = encoded(kernels, v * np.float32(scale), "F32", "e2m1", 32, np.array([[scale]], np.float32))
    assert codes[0].tolist() == [0, 2, 2, 4, 4, 6, 6, 7, 8, 12, 0, 0, 8]
    codes = encoded(kernels, v * np.float32(scale), "F32", "int4", 32, np.array([[scale]], np.float32))
    assert (codes[0].astype(int) - 8).tolist() == [0, 1, 1, 2, 2, 4, 5, 7, 0, -2, 0, 0, 0]


@pytest.mark.parametrize("element", ELEMENTS)
@pytest.mark.parametrize("scale", [0.5, 0.3])
def test_what_is_no_number_and_what_is_too_large(kernels: KernelSet, element: str, scale: float) -> None:
    w = np.array([[np.nan, np.inf, -np.inf, 3e38, -np.nan]] * 2, np.float32)
    scales = np.array([[scale], [0.0]], np.float32)
    numbers = values_of(kernels, element, encoded(kernels, w, "F32", element, 5, scales))
    largest = LARGEST[element] if element.startswith("e") else LARGEST[element] - 0.5
    lowest = -largest if element.startswith("e") else -largest - 1
    assert numbers[0].tolist() == [0, largest, lowest, largest, 0]
    assert numbers[1].tolist() == [0, 0, 0, 0, 0]
    assert not np.signbit(numbers[1]).any()


def test_error_counts_a_weight_that_is_no_number(kernels: KernelSet) -> None:
    src = np.full((2, 200), 0.25, np.float32)
    src[1, 7] = np.nan
    scales = np.full((2, 1), 0.25, np.float32)
    codes, stats = encoded(kernels, src, "F32", "e4m3fn", 200, scales), np.empty((2, FIGURES))
    kernels.error_scaled(src, "F32", "e4m3fn", codes, scales, 200, stats)
    assert stats[0].tolist() == [0, 200 * 0.0625, 0, 0, 0, 0]
    assert np.isnan(stats[1, :4]).all()
