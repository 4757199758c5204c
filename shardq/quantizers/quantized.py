"""Quantized: what every quantizer returns and every layout packs."""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Quantized:
    """Canonical quantized rows. Integers: weight = scale * (code - zero), where no zeros stand for 2**(bits-1); floats:
    weight = scale * value of the code, a bit pattern. Affine codes: weight = scale * code + bias.

    `G` is the number of groups in a row, a short last one included. Where rows share scales (`group_rows`), each row
    has its own copy.
    """

    codes: NDArray[np.uint8]  # [rows, columns], 0 .. 2**bits - 1
    scales: NDArray[np.float32]  # [rows, G], rounded to the scheme's scale format; may be negative in auto_round
    zeros: NDArray[np.uint8] | None  # [rows, G], 0 .. 2**bits - 1; all 2**(bits-1) when symmetric integers have them
    biases: NDArray[np.float32] | None = None  # [rows, G], of affine codes, which have no zeros
    global_scale: float | None = None  # what a reader divides `scales` by, where these are stored times it
    input_scale: float | None = None  # of activations, where the scheme has them calibrated: see input_scales.py

    def rows(self, part: slice) -> "Quantized":
        """Some of the rows, one after the other in memory."""
        return replace(
            self,
            codes=np.ascontiguousarray(self.codes[part]),
            scales=np.ascontiguousarray(self.scales[part]),
            zeros=None if self.zeros is None else np.ascontiguousarray(self.zeros[part]),
            biases=None if self.biases is None else np.ascontiguousarray(self.biases[part]),
        )
