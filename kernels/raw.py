"""The arrays that raw bytes come in."""

import numpy as np
from numpy.typing import NDArray

RawWeights = NDArray[np.uint16] | NDArray[np.float32]  # uint16 patterns for BF16 and F16, float32 for F32
Bytes = NDArray[np.uint8] | bytes | bytearray | memoryview
