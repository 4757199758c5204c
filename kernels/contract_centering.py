"""What the kernel does that moves scales by the means of inputs, to the bit."""

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from shardq.kernels.raw import RawWeights


class CenteringKernels(Protocol):
    """Part of KernelSet, whose words and rules for arrays these are."""

    def center_scales(
        self,
        src: RawWeights,
        dtype: str,
        bits: int,
        group: int,
        importance: NDArray[np.float32] | None,
        spread: NDArray[np.float32],
        means: NDArray[np.float32],
        scale: str,
        least: float,
        scales: NDArray[np.float32],
        out: NDArray[np.float32],
        losses: NDArray[np.float64],
    ) -> None:
        """Scales of symmetric integers of src [rows, cols], moved together so that each row's mean output errs less:
        `out` [rows, G] from `scales` [rows, G].

        Inputs x have the mean m (`means` [cols], finite) and, each column for itself, the variance v (`spread` [cols],
        finite, from 0 up). A row's expected squared error is then sum v * (w - s * q)^2 + (sum m * (s * q - w))^2, with
        one s for each group. Codes q = level(w / s), as in search_int, stay; scales that make this least:

            A = sum v*q*q; B = sum v*q*w; M = sum m*q; P = sum m*w, each over a group
            error = sum (s*M - P); stiffness = sum M*(M/A); drift = sum M*(B/A - s), over the groups with A > 0 (the
                first over all), in order; force = (error + drift) / (1 + stiffness)
            n = (B - force*M) / A, rounded to the format `scale`, half to even; s where that is below `least`, not
                finite, or of the other sign

        All arithmetic is fp32, each operation rounded once; sums over groups as in search_int. A row's scales are n if
        (sum v*(w - n*q)^2) + (sum (n*M - P))^2 is below the same under s, else s, as where anything is NaN. losses
        [rows, 2] of search_int: the second of a row that moved becomes sum importance*(w - n*q)^2 (None: 1).
        Source: the normal equations of one scale a group, whose matrix is a diagonal and M M^T (Sherman-Morrison).
        """
        ...
