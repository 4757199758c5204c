"""Largest magnitudes, for scales that reach beyond a group: measured in the source, or taken from the scale that the
result holds, where the traffic does not allow to measure."""

import math
from collections.abc import Callable
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from shardq.audit_plan import magnitude_windows
from shardq.carry import Goal
from shardq.checkpoint import TensorRef
from shardq.kernels import KernelSet
from shardq.quantizers.float_scales import global_scale
from shardq.quantizers.quantized import Quantized
from shardq.quantizers.scales import shared_scales
from shardq.schemes import Scheme
from shardq.source_rows import NoRowsError, SourceRows
from shardq.sources.base import Source

NEAR: Final = 16  # fp32 neighbours that are tried: a scale is two or three roundings away from its magnitude
INFINITY: Final = 0x7F800000  # pattern of fp32
OCTAVE: Final = 1 << 23  # patterns from one number to twice as much


def measure(t: TensorRef, source: Source, kernels: KernelSet, rounded: bool = False, goal: Goal | None = None) -> float:
    """The largest |w| of a matrix, exactly, or where its codes are carried its largest scale; infinite where a weight
    is NaN or infinite, or decodes to that. Reads it in windows, and raises what reading raises. `rounded` and `goal` as
    of SourceRows."""
    amax = 0.0
    rows = SourceRows(t, t.encoded[0] if t.encoded else None, rounded, source, kernels, goal=goal)
    try:
        for window in magnitude_windows(t):
            amax = max(amax, rows.largest(*window))
    except NoRowsError:
        return math.inf
    return amax


def measure_rows(weights: NDArray[Any], dtype: str, kernels: KernelSet) -> float:
    """The largest |w| of [rows, columns] weights as `quantize_rows` takes them."""
    found = np.empty((len(weights), 1), np.float32)
    kernels.group_absmax(weights, dtype, weights.shape[1], found)
    return float(found.max(initial=0))


def take(q: Quantized, scheme: Scheme, dtype: str) -> float | None:
    """The largest magnitude for which a worker would have written the scale of all that `q` was read with; None if
    there is none. `dtype` is that of the weight in the source."""
    if scheme.reach == "tensor":
        stored, near = float(q.scales[0, 0]), float(q.scales[0, 0]) * scheme.format.max_value
        return _largest(lambda amax: _tensor_scale(amax, scheme, dtype), stored, near)
    assert q.global_scale is not None, f"{scheme.name} has no scale beyond its groups"
    of_one = float(global_scale(1.0, scheme.format.max_value))
    near = of_one / q.global_scale if q.global_scale else float("inf")
    return _largest(lambda amax: float(global_scale(amax, scheme.format.max_value)), q.global_scale, near)


def _tensor_scale(amax: float, scheme: Scheme, dtype: str) -> float:
    absmax, scale = np.full((1, 1), amax, np.float32), np.empty((1, 1), np.float32)
    with np.errstate(over="ignore"):
        shared_scales(absmax, scheme, dtype, scale, amax)
    return float(scale[0, 0])


def _largest(scale_of: Callable[[float], float], stored: float, near: float) -> float | None:
    """The largest fp32 number whose scale is `stored`. Scales rise or fall all the way around `near`, so that those
    numbers are an interval, and twice one of them has another scale."""
    if not 0 < near < np.finfo(np.float32).max:  # NaN too
        return None
    middle = int(np.float32(near).view(np.uint32))

    def fits(pattern: int) -> bool:
        return scale_of(float(np.uint32(pattern).view(np.float32))) == stored

    tried = range(max(0, middle - NEAR), min(INFINITY, middle + NEAR + 1))
    low = next((p for p in tried if fits(p)), None)
    if low is None:
        return None
    high = min(low + OCTAVE, INFINITY)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return float(np.uint32(low).view(np.float32))
