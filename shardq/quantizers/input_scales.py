"""Scales of activations from the largest magnitude that calibration data have there, in fp32 as llm-compressor 0.14 and
compressed-tensors 0.20 compute them (observer static_minmax)."""

import math

import numpy as np

from shardq.formats import ELEMENTS
from shardq.quantizers.float_scales import E4M3, global_scale
from shardq.quantizers.scales import shared_scales
from shardq.schemes import ACTIVATIONS, Scheme


def input_scale(scheme: Scheme, amax: float, dtype: str) -> float | None:
    """The number that a checkpoint has for a matrix whose inputs are at most `amax` in magnitude; `dtype`: storage type
    of the weight, which plain scales have too.

    One for all tokens: amax over the largest element (448; 127.5 for int8, half of the range), rounded to `dtype`, half
    to even; of 0 the type's epsilon. Where groups have e4m3 scales below it: 448 * 6 / amax, 1 of 0. None for NaN,
    infinity, and a scale that overflows `dtype`. The scheme's activations are calibrated.
    """
    a = ACTIVATIONS[scheme.activation]
    assert a.calibrated, f"{a.name} has no scale that is known before serving"
    if not math.isfinite(amax):
        return None
    if a.scale == E4M3:
        return float(global_scale(amax, ELEMENTS[a.element].max_value))
    scales = np.empty((1, 1), np.float32)
    of_all = Scheme(a.element, 1, symmetric=True, scale=a.scale)  # of one group, which holds all activations
    overflows = shared_scales(np.full((1, 1), amax, np.float32), of_all, dtype, scales)
    return None if overflows else float(scales[0, 0])
