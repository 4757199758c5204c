"""Round-to-nearest of rows, in the arithmetic that the scheme names."""

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from shardq.quantizers.buffers import Buffers
from shardq.quantizers.float_scales import FLOAT_SCALES, float_scales
from shardq.quantizers.native_fp8 import sign_zeros
from shardq.quantizers.quantized import Quantized
from shardq.quantizers.scales import range_scales, shared_scales
from shardq.schemes import Scheme
from shardq.search import Search

if TYPE_CHECKING:
    from shardq.importance_vectors import Means
    from shardq.kernels import KernelSet


def quantize_rows(
    source: NDArray[Any],
    dtype: str,
    scheme: Scheme,
    buffers: Buffers,
    stats: NDArray[np.float64],
    kernels: "KernelSet",
    amax: float | None = None,
    stored: str | None = None,
    search: Search | None = None,
    importance: NDArray[np.float32] | None = None,
    losses: NDArray[np.float64] | None = None,
    means: "Means | None" = None,
) -> tuple[Quantized, int]:
    """Quantize [rows, columns] weights (uint16 bit views for BF16 and F16, float32 for F32) into `buffers`, and measure
    the result into `stats` [rows, 6]: the `figures.Figures` of each row.

    `amax`: the largest |w| of all that the scheme's `reach` names; None where that is the group. `stored`: the type
    that the weight has in the result, for scales of that type, where it is not `dtype`. `search`: how better scales are
    found; `importance` [columns], fp32, finite and from 0 up: how much an error counts there then (None: 1), and
    `losses` [rows, 3] get the `figures.Losses` of each row. `means`: those of the inputs, which a search that is
    `centered` needs.
    `source` begins with a row that is a multiple of the scheme's `group_rows`. Returns the result, which lies in the
    buffers, and the number of groups that hold NaN or infinity or whose scale overflows the scale format; such groups
    have no meaning and must not be written.
    """
    if scheme.reach != "group" and amax is None:
        raise ValueError(f"{scheme.name}: its scales need the largest magnitude of the {scheme.reach}")
    rows, columns = source.shape
    group = scheme.group_columns(columns)
    b = buffers.first(rows)
    if search is not None:
        from shardq.quantizers.search_job import SearchJob  # most runs search nothing
        from shardq.quantizers.search_rows import search_rows

        job = SearchJob(
            source, dtype, stored or dtype, scheme, search, importance, b, np.empty((rows, 2)), kernels, means
        )
        found = search_rows(job, stats, amax)
        if losses is not None:
            losses[:, :2], losses[:, 2] = job.losses, job.weigh()
        return found
    if scheme.numbers == "mlx":
        from shardq.quantizers.mlx import quantize_mlx

        return quantize_mlx(source, dtype, stored or dtype, scheme, b, stats, kernels)
    if scheme.numbers == "auto_round" and scheme.format.is_integer:
        # One pass over the weights; numerics of auto-round 0.16.1 model-free, as the kernel documents.
        bad = kernels.rtn_error_int(
            source, dtype, scheme.bits, group, scheme.symmetric, b.codes, b.scales, b.zeros, stats
        )
        return Quantized(b.codes, b.scales, b.zeros), bad
    if scheme.symmetric:
        bad = kernels.group_absmax(source, dtype, group, b.high)
        steps, global_scale = b.scales, None
        if scheme.scale in FLOAT_SCALES:
            steps, global_scale = float_scales(b, scheme, amax, kernels)
        else:
            bad += shared_scales(b.high, scheme, dtype, b.scales, amax, stored)
        kernels.encode_scaled(source, dtype, scheme.element, group, steps, b.codes)
        if scheme.numbers == "fp8":
            sign_zeros(source, b.codes)
        kernels.error_scaled(source, dtype, scheme.element, b.codes, steps, group, stats)
        return Quantized(b.codes, b.scales, None, global_scale=global_scale), bad
    bad = kernels.group_range(source, dtype, group, b.low, b.high)
    bad += range_scales(b.low, b.high, scheme, stored or dtype, b.scales, b.zeros)
    np.copyto(b.low, b.zeros)  # the kernels take whole numbers as fp32
    kernels.encode_affine(source, dtype, scheme.bits, group, b.scales, b.low, "add_round", b.codes)
    kernels.error_affine(source, dtype, scheme.bits, b.codes, b.scales, b.low, group, "zero", stats)
    return Quantized(b.codes, b.scales, b.zeros), bad


def measure_rows(
    source: NDArray[Any], dtype: str, scheme: Scheme, q: Quantized, stats: NDArray[np.float64], kernels: "KernelSet"
) -> None:
    """The figures of `quantize_rows` for rows that were read back."""
    group = scheme.group_columns(source.shape[1])
    if q.biases is not None:
        kernels.error_affine(source, dtype, scheme.bits, q.codes, q.scales, q.biases, group, "bias", stats)
    elif not scheme.format.is_integer or q.zeros is None:
        steps = q.scales if q.global_scale is None else q.scales / np.float32(q.global_scale)
        kernels.error_scaled(source, dtype, scheme.element, q.codes, steps, group, stats)
    else:
        kernels.error_int(source, dtype, scheme.bits, q.codes, q.scales, q.zeros, group, stats)
