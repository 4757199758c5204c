"""Scales from the extremes of groups, in fp32 as compressed-tensors 0.20 computes them (calculate_qparams), powers of
two by the floor rule as auto-round 0.16.1 (quant_mx); then rounded to the format in which they are stored."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from shardq.quantizers.native_fp8 import keep_normal
from shardq.schemes import WEIGHT_TYPE, Scheme

Floats = NDArray[np.float32]
STORED = {"BF16": "bf16", "F16": "fp16", "F32": "fp32"}
EPSILON = {"bf16": 2.0**-7, "fp16": 2.0**-10, "fp32": 2.0**-23}  # scale of a group of zeros
_EXPONENT_BITS = np.uint32(0x7F800000)
# What carries a mantissa over to the next power of two, by element: from 1.75 on, and from 1.9375 on for e2m3.
CARRY = {"e2m1": np.uint32(1 << 21), "e4m3fn": np.uint32(1 << 21), "e2m3": np.uint32(1 << 19)}


def shared_scales(
    absmax: Floats, scheme: Scheme, dtype: str, out: Floats, amax: float | None = None, stored: str | None = None
) -> int:
    """Scales of symmetric groups [rows, G] from their largest magnitudes, which are left as those of the shared groups;
    `amax` is that of the whole tensor, where the scheme reaches so far. `stored` as in `quantize_rows`.

    Returns the number of groups whose scale overflows its format; infinite magnitudes count elsewhere.
    """
    if scheme.reach == "tensor":
        assert amax is not None
        absmax[:] = amax
    if scheme.group_rows > 1:
        for row in range(0, len(absmax), scheme.group_rows):
            part = absmax[row : row + scheme.group_rows]
            part[:] = part.max(axis=0)
    if scheme.scale == "e8m0":
        out[:] = _power_scales(absmax, scheme, dtype)
        if scheme.numbers == "fp8":
            keep_normal(absmax, out)
        return 0
    top = ((1 << scheme.bits) - 1) / 2 if scheme.format.is_integer else scheme.format.max_value
    np.divide(absmax, np.float32(top), out=out)
    return _round_scales(out, np.isfinite(absmax), scheme, stored or dtype)


def range_scales(
    low: Floats, high: Floats, scheme: Scheme, dtype: str, scales: Floats, zeros: NDArray[np.uint8]
) -> int:
    """Scales and zero points (0 to 2^bits - 1) of asymmetric groups [rows, G] from their extremes, 0 in the range.

    Returns the number of groups whose scale overflows its format.
    """
    top = np.float32((1 << scheme.bits) - 1)
    finite = np.isfinite(low)
    low[:] = np.where(finite, np.minimum(low, 0), 0)
    high[:] = np.where(finite, np.maximum(high, 0), 0)
    np.divide(high - low, top, out=scales)
    half = np.float32(1 << (scheme.bits - 1))
    with np.errstate(invalid="ignore", divide="ignore"):  # a group of zeros
        signed = np.rint(-half - low / scales)  # from the scale before it is rounded; halves to the even signed number
    zeros[:] = np.where(scales == 0, half, np.clip(signed + half, 0, top))
    return _round_scales(scales, finite, scheme, dtype)


def _power_scales(absmax: Floats, scheme: Scheme, dtype: str) -> Floats:
    """Powers of two, as E8M0 holds them: the exponent of the magnitude less that of the element's largest value.

    floor: OCP MX 1.0, as auto-round computes it. even: rounded up from 1.75 or 1.9375 of a power of two on, as
    compressed-tensors does. ceil: the smallest power under which nothing saturates, as MLX. A group of zeros gets the
    smallest scale, 2^-127; by the floor rule auto-round takes its magnitude for 2.
    """
    largest = np.float32(scheme.format.max_value)
    if scheme.exponent == "ceil":
        ratio = (absmax / largest).view(np.uint32)
        biased = ((ratio & _EXPONENT_BITS) >> 23) + ((ratio & ~_EXPONENT_BITS) != 0)
    else:
        if scheme.exponent == "floor":
            of_group = _floor_exponents(absmax, dtype)
        else:
            of_group = ((absmax.view(np.uint32) + CARRY[scheme.element]) >> 23).astype(np.int64)
        biased = of_group - int(np.floor(np.log2(largest)))
    exponents = np.clip(biased, 0, 254).astype(np.uint32)
    return np.where(exponents == 0, np.float32(2.0**-127), (exponents << 23).view(np.float32)).astype(np.float32)


def _floor_exponents(absmax: Floats, dtype: str) -> NDArray[np.int64]:
    """Biased exponents of magnitudes, 128 for 0. auto-round takes log2 in fp32, which rounds up to a whole number what
    lies a few units below a power of two: no weight of 16 bits does."""
    exponents = (absmax.view(np.uint32) >> 23).astype(np.int64)
    if dtype == "F32":
        normal = np.isfinite(absmax) & (exponents > 0)
        logs = np.log2(np.where(normal, absmax, 1).astype(np.float64)).astype(np.float32)
        exponents = np.where(normal, np.floor(logs).astype(np.int64) + 127, exponents)
    return np.where(absmax == 0, 128, exponents)


def _round_scales(scales: Floats, finite: NDArray[np.bool_], scheme: Scheme, dtype: str) -> int:
    """Round in place to the stored format; a scale of 0 becomes the format's epsilon. Returns overflows."""
    stored = STORED[dtype] if scheme.scale == WEIGHT_TYPE else scheme.scale
    scales[:] = round_to(scales, stored)
    scales[scales == 0] = EPSILON[stored]
    over = finite & ~np.isfinite(scales)
    return int(over.sum())


def round_to(values: Floats, name: str) -> NDArray[Any]:
    """fp32 values rounded to fp32, fp16 or bf16, half to even; beyond the format infinity."""
    if name == "fp32":
        return values
    if name == "fp16":
        with np.errstate(over="ignore"):
            return values.astype(np.float16).astype(np.float32)
    assert name == "bf16", f"no scale format {name}"
    bits = values.view(np.uint32)
    rounded: NDArray[np.float32] = ((bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)).view(np.float32)
    return rounded
