"""Integers whose scales are searched, not taken from the extremes alone."""

from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from shardq.quantizers.buffers import Buffers
from shardq.quantizers.quantized import Quantized
from shardq.quantizers.scales import STORED, shared_scales
from shardq.schemes import WEIGHT_TYPE, Scheme
from shardq.search import Search

if TYPE_CHECKING:
    from shardq.kernels import KernelSet

LEAST: Final = float(np.float32(np.float16(1e-5)))  # scale that auto-round stores
TINY: Final = float(np.finfo(np.float32).tiny)


def search_symmetric(
    source: NDArray[Any],
    dtype: str,
    stored: str,
    scheme: Scheme,
    search: Search,
    importance: NDArray[np.float32] | None,
    b: Buffers,
    stats: NDArray[np.float64],
    losses: NDArray[np.float64],
    kernels: "KernelSet",
) -> tuple[Quantized, int]:
    """`rtn.quantize_rows` for symmetric integers: round-to-nearest's scales, better ones where there are, and codes by
    true division under what is stored. `losses` [rows, 2]: weighted errors under the first and under the last."""
    group = scheme.group_columns(source.shape[1])
    of_auto_round = scheme.numbers == "auto_round"
    if of_auto_round:
        bad = kernels.rtn_int(source, dtype, scheme.bits, group, True, b.codes, b.scales, b.zeros)
    else:
        bad = kernels.group_absmax(source, dtype, group, b.high)
        bad += shared_scales(b.high, scheme, dtype, b.scales, None, stored)
    kernels.search_int(
        source,
        dtype,
        scheme.bits,
        group,
        importance,
        search.objective,
        np.array(search.factors(logarithmic=True), np.float32),
        search.signs,
        search.sweeps,
        scale_format(scheme, stored),
        LEAST if of_auto_round else TINY,
        b.scales,
        losses,
    )
    kernels.encode_scaled(source, dtype, scheme.element, group, b.scales, b.codes)
    kernels.error_scaled(source, dtype, scheme.element, b.codes, b.scales, group, stats)
    return Quantized(b.codes, b.scales, b.zeros if of_auto_round else None), bad


def scale_format(scheme: Scheme, stored: str) -> str:
    """fp16, bf16 or fp32: what a scale is rounded to."""
    return STORED[stored] if scheme.scale == WEIGHT_TYPE else scheme.scale
