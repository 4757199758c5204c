"""Magnitudes behind scales that reach beyond a group: from the source, and back from the scale."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardq.audit_magnitude import measure_rows, take
from shardq.kernels import load
from shardq.layouts import find_layout
from shardq.quantizers.float_scales import global_scale
from shardq.quantizers.quantized import Quantized
from shardq.quantizers.scales import shared_scales
from shardq.schemes import PRESETS, Scheme

CT = find_layout("compressed-tensors")
NVFP4, TENSOR = (CT.settle(PRESETS[n].scheme) for n in ("NVFP4A16", "FP8_TENSOR"))
magnitudes = st.floats(2.0**-24, 2.0**14, width=32)


def scale_of(amax: float, scheme: Scheme, dtype: str) -> float:
    """What a worker stores."""
    if scheme.reach == "fused":
        return float(global_scale(amax, 6.0))
    out = np.empty((1, 1), np.float32)
    shared_scales(np.full((1, 1), amax, np.float32), scheme, dtype, out, amax)
    return float(out[0, 0])


def stored(scale: float, scheme: Scheme) -> Quantized:
    codes = np.zeros((2, 16), np.uint8)
    if scheme.reach == "fused":
        return Quantized(codes, np.ones((2, 1), np.float32), None, global_scale=scale)
    return Quantized(codes, np.full((2, 1), scale, np.float32), None)


@pytest.mark.parametrize(
    ("scheme", "dtype"), [(NVFP4, "BF16"), *((TENSOR, d) for d in ("BF16", "F16", "F32"))], ids=lambda x: str(x)[:16]
)
@given(amax=magnitudes)
def test_taken_magnitude_is_the_largest_that_gives_the_scale(scheme: Scheme, dtype: str, amax: float) -> None:
    scale = scale_of(amax, scheme, dtype)
    if scale == 2.0**-10 and amax / 448 < 2.0**-25:
        return  # F16 has no scale so small; that of zeros stands for it
    taken = take(stored(scale, scheme), scheme, dtype)
    assert taken is not None
    assert amax <= taken < 4 * amax  # the smallest scale of F16 stands for a half of itself to one and a half
    assert scale_of(taken, scheme, dtype) == scale
    above = float(np.nextafter(np.float32(taken), np.float32(np.inf)))
    assert scale_of(above, scheme, dtype) != scale


@pytest.mark.parametrize("scheme", [NVFP4, TENSOR], ids=["NVFP4", "TENSOR"])
@pytest.mark.parametrize("scale", [0.0, -1.0, math.nan, math.inf, -math.inf])
def test_what_is_no_scale_has_no_magnitude(scheme: Scheme, scale: float) -> None:
    assert take(stored(scale, scheme), scheme, "BF16") is None


def test_scale_of_zeros_is_taken() -> None:
    """Stored as 1, for NVFP4; as the type's epsilon otherwise."""
    for scheme in (NVFP4, TENSOR):
        taken = take(stored(scale_of(0.0, scheme, "BF16"), scheme), scheme, "BF16")
        assert taken is not None
        assert taken > 1


def test_rows_are_measured_exactly() -> None:
    kernels = load()
    weights = np.array([[0.5, -3.25, 0], [1, 2, 3]], np.float32)
    assert measure_rows(weights, "F32", kernels) == 3.25
    weights[1, 1] = np.nan
    assert measure_rows(weights, "F32", kernels) == math.inf
