"""Scales that are small floats themselves: e4m3 below a scale of everything that a server runs as one matrix, and e5m3
without one."""

from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from shardq.formats import ELEMENTS
from shardq.quantizers.buffers import Buffers
from shardq.schemes import Scheme

if TYPE_CHECKING:
    from shardq.kernels import KernelSet

E4M3, E5M3 = "e4m3fn", "e5m3"
FLOAT_SCALES: Final = (E4M3, E5M3)
SMALLEST: Final = np.float32(0.125)  # e4m3 scale of a group whose own would be 0
# Fields of e5m3 in those of an fp32 number.
SHIFT: Final = 20
REBIAS: Final = (127 - 15) << 3
LOWEST: Final = np.float32(2.0**-14)  # normal number; below it values are multiples of STEP
STEP: Final = np.float32(2.0**-17)


def float_scales(
    b: Buffers, scheme: Scheme, amax: float | None, kernels: "KernelSet"
) -> tuple[NDArray[np.float32], float | None]:
    """Put scales as they are stored into `b.scales`, from the largest magnitudes of groups in `b.high`. Returns the
    scales that codes are taken with, and the global scale that readers divide the stored ones by.

    e4m3 (compressed-tensors 0.20, `calculate_qparams`): e4m3(global * (absmax / largest element)), a 0 becomes 0.125.
    e5m3 (auto-round 0.16.1, `ref_fp4_quant`): e5m3(absmax * fp32(1 / largest element)), at most 114688; groups whose
    scale is 0 get codes of 0.
    """
    largest = scheme.format.max_value
    if scheme.scale == E5M3:
        np.multiply(b.high, np.float32(1 / largest), out=b.scales)
        np.copyto(b.scales, e5m3_values(e5m3_codes(b.scales)))
        return b.scales, None
    assert amax is not None
    whole = global_scale(amax, largest)
    np.divide(b.high, np.float32(largest), out=b.scales)
    with np.errstate(all="ignore"):  # what comes of an infinite `amax` is not kept
        np.multiply(b.scales, whole, out=b.scales)
        e4m3_codes(b.scales, b.zeros, kernels)
        e4m3_values(b.zeros, b.scales, kernels)
        b.scales[b.scales == 0] = SMALLEST
        np.divide(b.scales, whole, out=b.low)
    return b.low, float(whole)


def global_scale(amax: float, largest: float) -> np.float32:
    """compressed-tensors 0.20's `generate_gparam` in fp32: 448 * largest / amax, which lifts scales to the top of e4m3;
    1 where that is infinite, as for a tensor of zeros. torch divides a number by a tensor as number * (1 / tensor)."""
    inverse = np.float32(1) / np.maximum(np.float32(amax), np.finfo(np.float32).tiny)
    with np.errstate(over="ignore"):
        found = np.float32(ELEMENTS[E4M3].max_value * largest) * inverse
    return np.float32(found) if np.isfinite(found) else np.float32(1)


def e4m3_codes(values: NDArray[np.float32], out: NDArray[np.uint8], kernels: "KernelSet") -> None:
    """Codes of [rows, n] numbers, half to even, at most 448."""
    kernels.encode_scaled(values, "F32", E4M3, values.shape[1], np.ones((len(values), 1), np.float32), out)


def e4m3_values(codes: NDArray[np.uint8], out: NDArray[np.float32], kernels: "KernelSet") -> None:
    """The inverse of e4m3_codes, exact."""
    kernels.decode_scaled(codes, E4M3, np.ones((len(codes), 1), np.float32), codes.shape[1], out)


def e5m3_codes(values: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Codes of numbers from +0 up, half to even, at most 114688; five bits of exponent (bias 15) above three."""
    kept: NDArray[np.float32] = np.minimum(values, np.float32(ELEMENTS[E5M3].max_value))
    bits = kept.view(np.uint32)
    normal = ((bits + 0x7FFFF + ((bits >> SHIFT) & 1)) >> SHIFT) - REBIAS
    small = np.rint(np.minimum(kept, LOWEST) / STEP).astype(np.uint32)
    return np.where(kept < LOWEST, small, normal).astype(np.uint8)


def e5m3_values(codes: NDArray[np.uint8]) -> NDArray[np.float32]:
    """The inverse of e5m3_codes, exact."""
    wide = codes.astype(np.uint32)
    normal = ((wide + REBIAS) << SHIFT).view(np.float32)
    return np.where(wide < 8, wide.astype(np.float32) * STEP, normal).astype(np.float32)
