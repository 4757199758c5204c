"""What transformers 5.23 does otherwise than compressed-tensors when it quantizes to e4m3 (Fp8Quantize)."""

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

LEAST: Final = np.float32(2.0**-126)  # scales that are powers of two go no lower
SIGN: Final = np.uint8(0x80)


def keep_normal(absmax: NDArray[np.float32], scales: NDArray[np.float32]) -> None:
    """Raise powers of two to LEAST, in place; a group of zeros has the scale 1."""
    np.maximum(scales, LEAST, out=scales)
    scales[absmax == 0] = 1


def sign_zeros(source: NDArray[Any], codes: NDArray[np.uint8]) -> None:
    """Give codes of +0 the sign of the raw weight that they stand for, in place: -0 stays what it is."""
    negative = np.signbit(source) if source.dtype == np.float32 else source >= 0x8000
    codes[(codes == 0) & negative] = SIGN
