"""Small floats whose scales are searched among the numbers of the scales' format."""

from typing import Final

import numpy as np
from numpy.typing import NDArray

from shardq.formats import ELEMENTS
from shardq.quantizers.float_scales import (
    E5M3,
    SMALLEST,
    e4m3_codes,
    e4m3_values,
    e5m3_codes,
    e5m3_values,
    global_scale,
)
from shardq.quantizers.mlx import encode_mlx, scales_of_mlx
from shardq.quantizers.native_fp8 import LEAST, sign_zeros
from shardq.quantizers.quantized import Quantized
from shardq.quantizers.scales import shared_scales
from shardq.quantizers.search_job import SearchJob

POWERS: Final = np.ldexp(np.float32(1), np.minimum(np.arange(256) - 127, 127)).astype(np.float32)  # by E8M0 byte
LAST_POWER: Final = 254  # 255 is NaN
LAST_E4M3: Final = 0x7E
LAST_E5M3: Final = 0xFE
CENTERING_REACH: Final = 2  # codes that a scale may move for the means of inputs


def search_powers(job: SearchJob, stats: NDArray[np.float64]) -> tuple[Quantized, int]:
    """`rtn.quantize_rows` for scales that are powers of two: the rule's own, the one below, or the one above."""
    b, scheme = job.buffers, job.scheme
    bad = job.kernels.group_absmax(job.source, job.dtype, job.group, b.high)
    if scheme.numbers == "mlx":
        scales_of_mlx(b, job.dtype, scheme, job.kernels)
    else:
        shared_scales(b.high, scheme, job.dtype, b.scales, None, job.stored)
    chosen = b.zeros
    np.copyto(chosen, b.scales.view(np.uint32) >> 23, casting="unsafe")
    lowest = np.uint8(1) if scheme.numbers == "fp8" else np.uint8(0)
    assert POWERS[1] == LEAST
    _search_ladder(job, POWERS, np.maximum(chosen, lowest + 1) - np.uint8(1), np.minimum(chosen + 1, LAST_POWER))
    np.take(POWERS, chosen, out=b.scales)
    _encode(job, b.scales)
    job.kernels.error_scaled(job.source, job.dtype, scheme.element, b.codes, b.scales, job.group, stats)
    return Quantized(b.codes, b.scales, None), bad


def search_small_floats(job: SearchJob, stats: NDArray[np.float64], amax: float | None) -> tuple[Quantized, int]:
    """`rtn.quantize_rows` for scales of 8 bits with a fraction: all that lie around the rule's own. The global scale
    stays what it is without a search."""
    b, scheme, kernels = job.buffers, job.scheme, job.kernels
    bad = kernels.group_absmax(job.source, job.dtype, job.group, b.high)
    largest = np.float32(scheme.format.max_value)
    values, whole = np.empty((1, 256), np.float32), None
    if scheme.scale == E5M3:
        ratios = b.high * np.float32(1 / scheme.format.max_value)
        np.copyto(values, e5m3_values(np.arange(256, dtype=np.uint8)))
    else:
        ratios = b.high / largest
        e4m3_values(np.arange(256, dtype=np.uint8).reshape(1, -1), values, kernels)
        if scheme.numbers != "mlx":
            assert amax is not None
            whole = global_scale(amax, float(largest))
            with np.errstate(all="ignore"):  # what comes of an infinite `amax` is not kept
                ratios *= whole
    last_code = LAST_E5M3 if scheme.scale == E5M3 else LAST_E4M3
    values[0, last_code + 1 :] = 0
    ladder = values[0] if whole is None else values[0] / whole
    _codes_of(ratios, b.zeros, job)
    if whole is not None:
        b.zeros[b.zeros == 0] = np.searchsorted(values[0, : last_code + 1], SMALLEST)
    ends = np.empty((2, *ratios.shape), np.uint8)
    for end, factor in zip(ends, (job.search.low, job.search.high), strict=True):
        with np.errstate(over="ignore"):
            _codes_of(ratios * np.float32(factor), end, job)
    _search_ladder(job, ladder, np.maximum(ends[0], np.uint8(1)), ends[1])
    if job.search.centered:
        _center(job, ladder, last_code)
    np.take(values[0], b.zeros, out=b.scales)
    steps = b.scales if whole is None else np.take(ladder, b.zeros, out=b.low)
    _encode(job, steps)
    kernels.error_scaled(job.source, job.dtype, scheme.element, b.codes, steps, job.group, stats)
    return Quantized(b.codes, b.scales, None, global_scale=None if whole is None else float(whole)), bad


def _codes_of(ratios: NDArray[np.float32], out: NDArray[np.uint8], job: SearchJob) -> None:
    """The nearest scales' codes."""
    if job.scheme.scale == E5M3:
        np.copyto(out, e5m3_codes(np.minimum(ratios, np.float32(ELEMENTS[E5M3].max_value))))
    else:
        e4m3_codes(ratios, out, job.kernels)


def _search_ladder(
    job: SearchJob, ladder: NDArray[np.float32], first: NDArray[np.uint8], last: NDArray[np.uint8]
) -> None:
    """Better codes of scales in `zeros`."""
    b = job.buffers
    job.kernels.search_ladder(
        job.source,
        job.dtype,
        job.scheme.element,
        job.group,
        job.importance,
        job.search.objective,
        np.ascontiguousarray(ladder),
        first.astype(np.uint8),
        last.astype(np.uint8),
        b.zeros,
        job.losses,
    )


def _center(job: SearchJob, ladder: NDArray[np.float32], last_code: int) -> None:
    """Codes of scales in `zeros` under which each row's output has a smaller mean error."""
    if job.means is None:
        raise ValueError("a search that is centered needs the means of the inputs")
    b = job.buffers
    chosen = b.zeros.astype(np.int16)
    moved = np.empty_like(b.zeros)
    job.kernels.center_ladder(
        job.source,
        job.dtype,
        job.scheme.element,
        job.group,
        job.importance,
        job.means.spread,
        job.means.means,
        np.ascontiguousarray(ladder),
        np.maximum(chosen - CENTERING_REACH, 1).astype(np.uint8),
        np.minimum(chosen + CENTERING_REACH, last_code).astype(np.uint8),
        b.zeros,
        moved,
        job.losses,
    )
    b.zeros[:] = moved


def _encode(job: SearchJob, steps: NDArray[np.float32]) -> None:
    """Codes as the scheme's library takes them."""
    b, scheme = job.buffers, job.scheme
    if scheme.numbers == "mlx":
        encode_mlx(job.source, job.dtype, job.group, scheme, b, job.kernels)
        return
    job.kernels.encode_scaled(job.source, job.dtype, scheme.element, job.group, steps, b.codes)
    if scheme.numbers == "fp8":
        sign_zeros(job.source, b.codes)
