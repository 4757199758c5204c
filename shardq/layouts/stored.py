"""Floats as a file has them: arrays of the types that `worker.TARGET_ARRAYS` names."""

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from shardq.formats import ELEMENTS

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
    largest = ELEMENTS["bf16" if kind == np.uint16 else "fp16"].max_value
    kept = np.clip(values, np.float32(-largest), np.float32(largest))
    if kind == np.float16:
        return kept.astype(np.float16)
    assert kind == np.uint16, f"no float is stored as {kind}"
    bits = kept.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def load(stored: NDArray[Any]) -> NDArray[np.float32]:
    """What `store` has written, as fp32, exactly."""
    if stored.dtype == np.uint8:
        return np.ldexp(np.float32(1), stored.astype(np.int32) - BIAS)
    if stored.dtype == np.uint16:
        return (stored.astype(np.uint32) << 16).view(np.float32)
    return stored.astype(np.float32)
