"""Scales of small floats, chosen among the numbers of their format, as formulas."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from shardq.kernels.reference.elements import FLOATS, float_codes, float_values
from shardq.kernels.reference.searches import LADDER_RUNGS, Groups


@dataclass(frozen=True, slots=True)
class Found:
    """Codes of scales, and both weighted errors, [rows, G]: under the old codes and under these."""

    chosen: torch.Tensor
    before: torch.Tensor
    after: torch.Tensor


def checked_ladder(element: str, ladder: NDArray[np.float32]) -> torch.Tensor:
    """The scales [256] by code; ValueError for what is none, and for an element that is no float."""
    if element not in FLOATS:
        raise ValueError(f"element: expected one of {', '.join(FLOATS)}, found {element}")
    if ladder.dtype != np.float32 or ladder.shape != (LADDER_RUNGS,):
        raise ValueError(f"ladder: expected {LADDER_RUNGS} float32 numbers, found {ladder.dtype} {ladder.shape}")
    if not (np.isfinite(ladder).all() and (ladder >= 0).all()):
        raise ValueError("ladder: expected finite numbers from 0 up")
    return torch.from_numpy(ladder.copy())


def loss(g: Groups, element: str, scales: torch.Tensor, divide: bool) -> torch.Tensor:
    """Weighted error of the nearest elements under scales [rows, G]."""
    steps, size = scales[..., None], g.w.abs()
    quotient = size / steps if divide else size * (1.0 / steps)
    form = FLOATS[element]
    quotient = torch.where(quotient < form.largest, quotient, form.largest)
    difference = size - steps * float_values(float_codes(quotient, form), form)
    return g.sum((difference * difference) * g.e)


def search(
    g: Groups, element: str, ladder: torch.Tensor, first: torch.Tensor, last: torch.Tensor, chosen: torch.Tensor
) -> Found:
    """See KernelSet.search_ladder; all but `ladder` [256] are int64 [rows, G]."""
    best, reached = chosen, loss(g, element, ladder[chosen], divide=False)
    for i in range(int((last - first).max()) + 1):
        code = (first + i).minimum(last).clamp(min=0)
        error = loss(g, element, ladder[code], divide=False)
        better = (first + i <= last) & (error < reached)
        best, reached = torch.where(better, code, best), torch.where(better, error, reached)
    before, after = (loss(g, element, ladder[codes], divide=True) for codes in (chosen, best))
    better = after < before
    return Found(torch.where(better, best, chosen), before, torch.where(better, after, before))
