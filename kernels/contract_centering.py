"""What the kernels do that move scales or biases by the means of inputs, to the bit."""

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from shardq.kernels.raw import RawWeights


class CenteringKernels(Protocol):
    """Part of KernelSet, whose words and rules for arrays these are."""

    def center_groups(
        self,
        src: RawWeights,
        dtype: str,
        bits: int,
        group: int,
        importance: NDArray[np.float32] | None,
        spread: NDArray[np.float32],
        means: NDArray[np.float32],
        rule: str,
        scale: str,
        least: float,
        scales: NDArray[np.float32],
        offsets: NDArray[np.float32],
        out: NDArray[np.float32],
        losses: NDArray[np.float64],
    ) -> None:
        """One number of each group of affine codes, moved together so that each row's mean output errs less: `out`
        [rows, G] from `scales` (rule zero) or `offsets` (bias), both [rows, G] as in search_affine. Symmetric integers
        are those with the zero point 2^(bits-1).

        Inputs x have the mean m (`means` [cols], finite) and, each column for itself, the variance v (`spread` [cols],
        finite, from 0 up). A row's expected squared error is then sum v * e^2 + (sum m * e)^2. Codes stay. Of a weight
        w, the number that moves is multiplied by p, and r is left under the one that it was, o:

            zero: p = level(w / s, -z, top - z); r = w - s*p; o is the scale s, z the zero point
            bias: p = 1; r = (w - s * level((w - b) / s, 0, top)) - b; o is the bias b

        The numbers n that make this least:

            A = sum (v*p)*p; B = sum (v*p)*r; C = sum (v*r)*r; M = sum m*p; R = sum m*r, each over a group
            error = sum R; stiffness = sum M*(M/A); drift = sum M*(B/A), over the groups with A > 0 (the first over
                all), in order; force = (error - drift) / (1 + stiffness)
            n = o + (B + force*M) / A, rounded to the format `scale`, half to even; o where that is not finite, and as a
                scale where it is below `least`, or of the other sign

        All arithmetic is fp32, each operation rounded once; sums over groups as in search_int. With d = n - o, a row's
        numbers are n if sum (C + d*(d*A - (B+B))) + (error - sum d*M)^2 is below sum C + error^2, sums of groups in
        order, else o, as where anything is NaN. losses [rows, 2] of search_affine: the second of a row that moved
        becomes the sum of G + d*(d*E - (F+F)), or of 0 where that is not above 0: E, F and G are A, B and C with the
        importance (None: 1) in place of v.
        Source: the normal equations of one number a group, whose matrix is a diagonal and M M^T (Sherman-Morrison).
        """
        ...

    def center_ladder(
        self,
        src: RawWeights,
        dtype: str,
        element: str,
        group: int,
        importance: NDArray[np.float32] | None,
        spread: NDArray[np.float32],
        means: NDArray[np.float32],
        ladder: NDArray[np.float32],
        first: NDArray[np.uint8],
        last: NDArray[np.uint8],
        chosen: NDArray[np.uint8],
        out: NDArray[np.uint8],
        losses: NDArray[np.float64],
    ) -> None:
        """Scales of a float element, among those of a format, so that each row's mean output errs less: `out` [rows, G]
        from `chosen` [rows, G], codes of `ladder` as in search_ladder, `spread` and `means` as in center_groups. Here
        codes of weights are always those of the scale.

            under a scale s: d = |w| - s * q, q = the element nearest to |w| / s, half to even, at most the largest (a
                NaN too); V = sum (d*d)*v; F = sum d*m, d with its sign turned where w is negative
            R = sum F over all groups in order, under `chosen`
            for each group in order: r = R - F under `chosen`; the codes from `first` to `last` in order, each where
                V + (r + F)*(r + F) is below that of all before, `chosen` first of all; R = r + F under the best

        A row's codes are these if (sum V) + R*R is below the same under `chosen`, else `chosen`. losses [rows, 2] of
        search_ladder: the second of a row that moved becomes sum (d*d)*importance (None: 1). Arithmetic, sums and
        errors as in search_ladder.
        """
        ...
