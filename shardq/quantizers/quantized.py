"""Quantized: what every quantizer returns and every layout packs."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Quantized:
    """Canonical quantized rows; weight = scale * (code - zero).

    `G` is the number of groups in a row, a short last one included.
    """

    codes: NDArray[np.uint8]  # [rows, columns], 0 .. 2**bits - 1
    scales: NDArray[np.float32]  # [rows, G], already rounded to the scheme's scale format; signed when symmetric
    zeros: NDArray[np.uint8]  # [rows, G], 0 .. 2**bits - 1; the constant 2**(bits-1) when symmetric
