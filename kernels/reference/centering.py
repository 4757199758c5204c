"""Scales of symmetric integers that move together for a smaller mean error, as formulas."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from shardq.kernels.reference.arrays import grouped
from shardq.kernels.reference.searches import Groups, checked_importance, level, stored


@dataclass(frozen=True, slots=True)
class Centered:
    """Scales [rows, G], which rows moved [rows], and the weighted errors of groups under what moved [rows, G]."""

    scales: torch.Tensor
    moved: torch.Tensor
    lost: torch.Tensor


def columns(spread: NDArray[Any], means: NDArray[Any], group: int, cols: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Both as groups have them, [1, G, width]; ValueError for what is not one number for each of the columns, finite,
    and of the spread from 0 up."""
    if means.dtype != np.float32 or means.shape != (cols,) or not np.isfinite(means).all():
        raise ValueError(f"means: expected {cols} finite float32 numbers, found {means.dtype} {means.shape}")
    both = checked_importance(spread, cols, "spread"), torch.from_numpy(means.copy())
    first, second = (grouped(x.reshape(1, cols), group, 0.0) for x in both)
    return first, second


def center(
    g: Groups, old: torch.Tensor, bits: int, inputs: tuple[torch.Tensor, torch.Tensor], scale: str, least: float
) -> Centered:
    """See KernelSet.center_scales; `inputs` are the `columns`."""
    spread, means = inputs
    half = float(1 << bits - 1)
    q = level(g.w / old[..., None], -half, half - 1)
    square, product = g.sum((spread * q) * q), g.sum((spread * q) * g.w)
    shift, aim = g.sum(means * q), g.sum(means * g.w)
    any_code, zero = square > 0, torch.zeros_like(square)
    error = _added(old * shift - aim)
    stiffness = _added(torch.where(any_code, shift * (shift / square), zero))
    drift = _added(torch.where(any_code, shift * (product / square - old), zero))
    force = (error + drift) / (1.0 + stiffness)
    new = stored((product - force[:, None] * shift) / square, scale)
    allowed = (new.abs() >= least) & new.isfinite() & (new.signbit() == old.signbit())
    new = torch.where(allowed, new, old)
    one, other = g.w - old[..., None] * q, g.w - new[..., None] * q
    left = _added(new * shift - aim)
    before = _added(g.sum((one * one) * spread)) + error * error
    after = _added(g.sum((other * other) * spread)) + left * left
    moved = after < before
    return Centered(torch.where(moved[:, None], new, old), moved, g.sum((other * other) * g.e))


def _added(x: torch.Tensor) -> torch.Tensor:
    """fp32 sums of [rows, G] over groups, in order."""
    with np.errstate(all="ignore"):
        return torch.from_numpy(np.add.accumulate(x.numpy(), axis=1)[:, -1] + np.float32(0))
