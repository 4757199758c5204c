"""Affine codes: natively as in the reference, and as the formulas of those who read them."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import KINDS, Check, Make
from numpy.typing import NDArray

from shardq.kernels import DTYPES, KernelSet
from shardq.kernels.contract import DECODING_RULES, ENCODING_RULES, FIGURES

Numbers = NDArray[np.float32]

ENDS = (0.0, -0.0, 1e-45, 2.0**-127, 2.0**126, 3e38, np.inf, np.nan, 1.0, -0.5)


def encoded(
    kernels: KernelSet, src: NDArray[Any], dtype: str, bits: int, group: int, steps: Numbers, places: Numbers, rule: str
) -> NDArray[np.uint8]:
    codes = np.full(src.shape, 0xA5, np.uint8)
    kernels.encode_affine(src, dtype, bits, group, steps, places, rule, codes)
    return codes


def make_steps(seed: int, kind: str, shape: tuple[int, int]) -> tuple[Numbers, Numbers]:
    """Scales and offsets: fitting ones (signed), powers of two, and those that no one should pass."""
    rng = np.random.default_rng(seed)
    if kind == "ends":
        ends = np.array(ENDS, np.float32)
        return rng.choice(ends, shape), rng.choice(ends, shape)
    offsets = rng.integers(-4, 20, shape).astype(np.float32)
    if kind == "powers":
        return np.exp2(rng.integers(-12, 2, shape)).astype(np.float32), offsets
    if kind == "bias":
        offsets = (rng.standard_normal(shape) * 0.05).astype(np.float32)
    return (rng.standard_normal(shape) * 0.01).astype(np.float32), offsets


def without_nan(x: NDArray[Any]) -> NDArray[Any]:
    """Which NaN a result is, is not specified."""
    return np.where(np.isnan(x), x.dtype.type(np.nan), x)


@given(
    seed=st.integers(0, 2**32 - 1),
    kind=st.sampled_from(KINDS),
    step_kind=st.sampled_from(("zero", "bias", "powers", "ends")),
    shape=st.tuples(st.integers(1, 4), st.integers(1, 2100)),
    dtype=st.sampled_from(DTYPES),
    bits=st.integers(2, 8),
    group=st.sampled_from((1, 2, 5, 16, 31, 32, 33, 64, 100, 128, 5000)),
    rule=st.sampled_from(ENCODING_RULES),
    decoding=st.sampled_from(DECODING_RULES),
)
@settings(max_examples=250, deadline=None)
def test_affine_kernels_equal_reference(
    kernels: KernelSet,
    reference: KernelSet,
    make_weights: Make,
    same_bits: Check,
    seed: int,
    kind: str,
    step_kind: str,
    shape: tuple[int, int],
    dtype: str,
    bits: int,
    group: int,
    rule: str,
    decoding: str,
) -> None:
    src = make_weights(seed, kind, *shape, dtype)
    steps, places = make_steps(seed, step_kind, (shape[0], -(-shape[1] // group)))
    codes = encoded(kernels, src, dtype, bits, group, steps, places, rule)
    same_bits(codes, encoded(reference, src, dtype, bits, group, steps, places, rule))
    values, stats = np.empty((2, *shape), np.float32), np.full((2, shape[0], FIGURES), -1.0)
    with np.errstate(all="ignore"):
        for i, each in enumerate((kernels, reference)):
            each.decode_affine(codes, steps, places, group, decoding, values[i])
            each.error_affine(src, dtype, bits, codes, steps, places, group, decoding, stats[i])
    same_bits(without_nan(values[0]), without_nan(values[1]))
    same_bits(without_nan(stats[0]), without_nan(stats[1]))


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_subtract_and_bias_are_the_rule_of_mlx(kernels: KernelSet, make_weights: Make, bits: int) -> None:
    w = make_weights(bits, "plain", 32, 256, "F32")
    groups, top = w.reshape(32, 4, 64), np.float32(2**bits - 1)
    low, high = groups.min(2), groups.max(2)
    steps = np.maximum((high - low) / top, np.float32(1e-7))
    steps = np.where(np.abs(low) > np.abs(high), steps, -steps)
    edge = np.where(np.abs(low) > np.abs(high), low, high)
    levels = np.rint(edge / steps)
    steps = np.where(levels != 0, edge / np.where(levels != 0, levels, np.float32(1)), steps)
    places = np.where(levels != 0, edge, np.float32(0))
    expected = np.clip(np.rint((groups - places[..., None]) / steps[..., None]), 0, top).reshape(w.shape)
    codes = encoded(kernels, w, "F32", bits, 64, steps, places, "subtract")
    assert np.array_equal(codes, expected.astype(np.uint8))
    values = np.empty_like(w)
    kernels.decode_affine(codes, steps, places, 64, "bias", values)
    assert np.array_equal(
        values.reshape(groups.shape), steps[..., None] * codes.reshape(groups.shape) + places[..., None]
    )


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_both_rules_of_zero_points(kernels: KernelSet, bits: int) -> None:
    """compressed-tensors rounds the sum, auto-round the quotient: half-way they differ where the zero point is odd."""
    halves = np.random.default_rng(bits).integers(-(2**bits), 2**bits, (32, 256)).astype(np.float32) / 2
    step, top = np.float32(0.125), 2**bits - 1
    steps, zeros = np.full((32, 8), step, np.float32), np.full((32, 8), 2 ** (bits - 1) - 1, np.float32)
    sums = encoded(kernels, halves * step, "F32", bits, 32, steps, zeros, "add_round")
    assert np.array_equal(sums, np.clip(np.rint(halves + zeros[0, 0]), 0, top).astype(np.uint8))
    apart = encoded(kernels, halves * step, "F32", bits, 32, steps, zeros, "round_add")
    assert np.array_equal(apart, np.clip(np.rint(halves) + zeros[0, 0], 0, top).astype(np.uint8))
    assert (sums != apart).any()


@pytest.mark.parametrize("rule", ENCODING_RULES)
def test_scale_zero_makes_equal_codes(kernels: KernelSet, rule: str) -> None:
    w = np.array([[np.nan, np.inf, -3.0, 5.0, 0.0]], np.float32)
    codes = encoded(kernels, w, "F32", 4, 5, np.zeros((1, 1), np.float32), np.full((1, 1), 7, np.float32), rule)
    assert codes.tolist() == [[0 if rule == "subtract" else 7] * 5]
