"""Scales of symmetric integers that move together for a smaller mean error, as formulas."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from shardq.kernels.reference.arrays import grouped
from shardq.kernels.reference.searches import Groups, level, stored


@dataclass(frozen=True, slots=True)
class Centered:
    """Scales [rows, G], which rows moved [rows], and the weighted errors of groups under what moved [rows, G]."""

    scales: torch.Tensor
    moved: torch.Tensor
    lost: torch.Tensor


def checked_means(means: NDArray[Any], cols: int) -> torch.Tensor:
    """Mean inputs [cols]; ValueError for another size, and numbers that are not finite."""
    if means.dtype != np.float32 or means.shape != (cols,) or not np.isfinite(means).all():
        raise ValueError(f"means: expected {cols} finite float32 numbers, found {means.dtype} {means.shape}")
    return torch.from_numpy(means.copy())


def columns(values: torch.Tensor, group: int, cols: int) -> torch.Tensor:
    """Numbers of columns [cols] as groups have them, [1, G, width]."""
    return grouped(values.reshape(1, cols), group, 0.0)


def center(
    g: Groups, old: torch.Tensor, bits: int, spread: torch.Tensor, means: torch.Tensor, scale: str, least: float
) -> Centered:
    """See KernelSet.center_scales."""
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
