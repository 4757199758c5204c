"""Round-to-nearest as `mx.quantize` of MLX 0.32.4 computes it on a CPU, in fp32.

Affine: each group's edge (its extreme of larger magnitude) gets a code of its own, and scale and bias are rounded only
when they are stored. mxfp4 and mxfp8: the smallest power of two under which nothing saturates. e4m3 scales: the largest
magnitude over 6, rounded to e4m3. (Of fp16 weights MLX divides the largest in fp16: where that quotient is subnormal,
its exponent of mxfp8 may be one lower.)
"""

from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from shardq.quantizers.buffers import Buffers
from shardq.quantizers.quantized import Quantized
from shardq.quantizers.scales import STORED, round_to, shared_scales
from shardq.schemes import Scheme

if TYPE_CHECKING:
    from shardq.kernels import KernelSet

SMALLEST_STEP: Final = np.float32(1e-7)  # of affine codes
PIECE_WEIGHTS: Final = 1 << 16  # widened at once for four-bit floats: stays in a core's cache
NEGATIVE_ZERO, NEGATIVE_ZERO_E4M3 = 0x08, 0x80  # codes; MLX keeps the sign of a zero weight in e4m3 only
_PATTERNS: Final = {2: np.uint16, 4: np.uint32}


def quantize_mlx(
    source: NDArray[Any],
    dtype: str,
    stored: str,
    scheme: Scheme,
    buffers: Buffers,
    stats: NDArray[np.float64],
    kernels: "KernelSet",
) -> tuple[Quantized, int]:
    """`rtn.quantize_rows` for schemes whose `numbers` are "mlx"; arguments and result as there."""
    if not scheme.symmetric:
        return _quantize_affine(source, dtype, stored, scheme, buffers, stats, kernels)
    group = scheme.group_columns(source.shape[1])
    b = buffers
    bad = kernels.group_absmax(source, dtype, group, b.high)
    scales_of_mlx(b, dtype, scheme, kernels)
    encode_mlx(source, dtype, group, scheme, b, kernels)
    kernels.error_scaled(source, dtype, scheme.element, b.codes, b.scales, group, stats)
    return Quantized(b.codes, b.scales, None), bad


def scales_of_mlx(b: Buffers, dtype: str, scheme: Scheme, kernels: "KernelSet") -> None:
    """Scales of small floats from the largest magnitudes of groups in `b.high`."""
    if scheme.scale == "e8m0":
        shared_scales(b.high, scheme, dtype, b.scales)
        b.scales[b.high == 0] = 1  # where the byte 127 stands for a group of zeros
    else:
        _round_to_e4m3(b.high, scheme, b, kernels)


def encode_mlx(source: NDArray[Any], dtype: str, group: int, scheme: Scheme, b: Buffers, kernels: "KernelSet") -> None:
    """Codes of small floats under `b.scales`."""
    if scheme.element == "e2m1":
        _encode_e2m1(source, dtype, group, b, kernels)
    else:
        kernels.encode_scaled(source, dtype, scheme.element, group, b.scales, b.codes)
        b.codes[source.view(_PATTERNS[source.itemsize]) == 1 << (8 * source.itemsize - 1)] = NEGATIVE_ZERO_E4M3


def _quantize_affine(
    source: NDArray[Any],
    dtype: str,
    stored: str,
    scheme: Scheme,
    b: Buffers,
    stats: NDArray[np.float64],
    kernels: "KernelSet",
) -> tuple[Quantized, int]:
    """Codes of weight = scale * code + bias. Scales are negative where the largest magnitude is positive."""
    group = scheme.group_columns(source.shape[1])
    bad = kernels.group_range(source, dtype, group, b.low, b.high)
    finite = affine_lines(b, scheme.bits)
    kernels.encode_affine(source, dtype, scheme.bits, group, b.scales, b.low, "subtract", b.codes)
    round_lines(b, stored)
    bad += int((finite & ~(np.isfinite(b.scales) & np.isfinite(b.low))).sum())
    kernels.error_affine(source, dtype, scheme.bits, b.codes, b.scales, b.low, group, "bias", stats)
    return Quantized(b.codes, b.scales, None, biases=b.low), bad


def affine_lines(b: Buffers, bits: int) -> NDArray[np.bool_]:
    """Scales, and biases in `b.low`, from the extremes of groups in `b.low` and `b.high`, before they are rounded.
    Returns which groups are finite."""
    finite = np.isfinite(b.low) & np.isfinite(b.high)
    low, high = np.where(finite, b.low, 0), np.where(finite, b.high, 0)
    with np.errstate(over="ignore", invalid="ignore"):  # a range beyond fp32 counts as a bad group
        step = np.maximum((high - low) / np.float32((1 << bits) - 1), SMALLEST_STEP)
        falling = np.abs(low) <= np.abs(high)
        edge = np.where(falling, high, low)
        levels = np.rint(edge / np.where(falling, -step, step))
        np.copyto(b.scales, np.where(falling, -step, step))
        np.divide(edge, levels, out=b.scales, where=levels != 0)
        np.copyto(b.low, np.where(levels != 0, edge, np.float32(0)))
    return finite


def round_lines(b: Buffers, stored: str) -> None:
    """Scales and biases as they are stored."""
    b.scales[:], b.low[:] = round_to(b.scales, STORED[stored]), round_to(b.low, STORED[stored])


def _round_to_e4m3(absmax: NDArray[np.float32], scheme: Scheme, b: Buffers, kernels: "KernelSet") -> None:
    """e4m3 scales: the largest magnitude over 6, half to even, at most 448. Below 2^-10 they are 0, and so is the whole
    group: MLX has no second scale that would lift it."""
    ratios, ones = absmax / np.float32(scheme.format.max_value), np.ones((len(absmax), 1), np.float32)
    kernels.encode_scaled(ratios, "F32", scheme.scale, ratios.shape[1], ones, b.zeros)
    kernels.decode_scaled(b.zeros, scheme.scale, ones, ratios.shape[1], b.scales)


def _encode_e2m1(source: NDArray[Any], dtype: str, group: int, b: Buffers, kernels: "KernelSet") -> None:
    """Codes as MLX's CPU finds them: the first nearest of +0, 0.5, ... 6, -0, -0.5, ...: of two equally near the
    smaller magnitude, and +0 for what rounds to zero. (Its Metal kernel takes the even code and keeps the sign.)

    The kernel takes the even one, so half-way weights are moved towards zero by one unit of fp32. Half-way means that
    w is exactly a midpoint (3 bits) times a scale (4 bits): no such w has more than 16 significant bits, and no other
    w of so few bits is near enough to a midpoint to be moved across it.
    """
    rows, columns = source.shape
    piece = max(1, PIECE_WEIGHTS // columns)
    wide = np.empty((min(rows, piece), columns), np.float32)
    for row in range(0, rows, piece):
        part = slice(row, min(rows, row + piece))
        weights, codes = wide[: part.stop - row], b.codes[part]
        kernels.widen(source[part], dtype, weights)
        patterns = weights.view(np.uint32)
        movable = ((patterns & 0xFFFF) == 0) & ((patterns & 0x7FFFFFFF) != 0)
        np.subtract(patterns, movable, out=patterns)
        kernels.encode_scaled(weights, "F32", "e2m1", group, b.scales[part], codes)
        codes[codes == NEGATIVE_ZERO] = 0
