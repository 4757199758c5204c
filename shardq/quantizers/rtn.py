"""Plain round-to-nearest on the minimum and maximum of each group.

Numerics: auto-round 0.16.1 model-free integers (full-range symmetric with a signed scale; asymmetric in float32), as
the kernel `rtn_int` documents.
"""

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from shardq.arena import Arena
from shardq.quantizers.quantized import Quantized
from shardq.schemes import Scheme

if TYPE_CHECKING:
    from shardq.kernels import KernelSet


def take_buffers(arena: Arena, rows: int, columns: int, scheme: Scheme) -> Quantized:
    """Room for the result of up to `rows` rows."""
    groups = scheme.groups(columns)
    return Quantized(
        arena.take((rows, columns), np.uint8),
        arena.take((rows, groups), np.float32),
        arena.take((rows, groups), np.uint8),
    )


def quantize_rows(
    source: NDArray[Any],
    dtype: str,
    scheme: Scheme,
    buffers: Quantized,
    stats: NDArray[np.float64],
    kernels: "KernelSet",
) -> tuple[Quantized, int]:
    """Quantize [rows, columns] weights (uint16 bit views for BF16 and F16, float32 for F32) into `buffers`, and measure
    the result into `stats` [rows, 3]: sum of squared errors, sum of squared weights, largest error of each row.

    Returns the result, which lies in the buffers, and the number of groups that hold NaN or infinity or whose scale
    overflows the scale format; such groups have no meaning and must not be written.
    """
    rows, columns = source.shape
    part = Quantized(buffers.codes[:rows], buffers.scales[:rows], buffers.zeros[:rows])
    group, bits = scheme.group_columns(columns), scheme.bits
    bad = kernels.rtn_error_int(
        source, dtype, bits, group, scheme.symmetric, part.codes, part.scales, part.zeros, stats
    )
    return part, bad
