"""Floats as a file has them: arrays of the types that `worker.TARGET_ARRAYS` names."""

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from shardq.formats import ELEMENTS

BLOCK: Final = 1 << 14  # values at once
BIAS: Final = 127  # of the exponent, in a byte that stands for a power of two as in fp32


def store(values: NDArray[np.float32], kind: "np.dtype[Any]") -> NDArray[Any]:
    """fp32 values, of any shape, as float32, float16, bf16 patterns (uint16), or exponents of powers of two (uint8).

    Rounded to nearest, half to even; what is beyond the type becomes its largest finite value, never infinity. Powers
    of two are 2^-127 to 2^127, exactly; NaN has no meaning.
    """
    if kind == np.uint8:
        return (values.view(np.uint32) >> 23).astype(np.uint8)  # 2^-127 is subnormal: its exponent field is 0
    if kind == np.float32:
        return values
    assert kind in (np.float16, np.uint16), f"no float is stored as {kind}"
    out = np.empty(values.shape, kind)
    narrow = _to_fp16 if kind == np.float16 else _to_bf16
    source, target = values.reshape(-1), out.reshape(-1)
    for at in range(0, source.size, BLOCK):  # fresh pages for temporaries of a whole tile would take most of the time
        target[at : at + BLOCK] = narrow(source[at : at + BLOCK])
    return out


def _to_fp16(values: NDArray[np.float32]) -> NDArray[np.float16]:
    largest = np.float32(ELEMENTS["fp16"].max_value)
    return np.clip(values, -largest, largest).astype(np.float16)


def _to_bf16(values: NDArray[np.float32]) -> NDArray[np.uint32]:
    largest = np.float32(ELEMENTS["bf16"].max_value)
    bits = np.clip(values, -largest, largest).view(np.uint32)
    half, one, low = np.uint32(0x7FFF), np.uint32(1), np.uint32(16)
    return np.right_shift(bits + half + ((bits >> low) & one), low)


def load(stored: NDArray[Any]) -> NDArray[np.float32]:
    """What `store` has written, as fp32, exactly."""
    if stored.dtype == np.uint8:
        return np.ldexp(np.float32(1), stored.astype(np.int32) - BIAS)
    if stored.dtype == np.uint16:
        return (stored.astype(np.uint32) << 16).view(np.float32)
    return stored.astype(np.float32)
