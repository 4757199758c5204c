"""Scales of symmetric integers by weighted least squares, as formulas."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from shardq.kernels.reference.searches import Groups, level, stored


@dataclass(frozen=True, slots=True)
class Found:
    """Scales and both weighted errors, [rows, G]: under the old scales and under these."""

    scales: torch.Tensor
    before: torch.Tensor
    after: torch.Tensor


def fitted(g: Groups, inverse: torch.Tensor, half: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Least-squares scale of the codes that an inverse scale [rows, G] gives, and what it explains."""
    q = level(g.w * inverse[..., None], -half, half - 1)
    product, square = g.sum(q * (g.e * g.w)), g.sum((g.e * q) * q)
    return product / square, product * (product / square)


def loss(g: Groups, scales: torch.Tensor, half: float) -> torch.Tensor:
    """Weighted error under scales as they are stored."""
    steps = scales[..., None]
    difference = g.w - steps * level(g.w / steps, -half, half - 1)
    return g.sum((difference * difference) * g.e)


def search(
    g: Groups, old: torch.Tensor, bits: int, factors: Sequence[torch.Tensor], signs: str, sweeps: int, scale: str,
    least: float,
) -> Found:  # fmt: skip
    """See KernelSet.search_int."""
    half = float(1 << bits - 1)
    high = torch.where(g.w > 0, g.w, 0.0).amax(2)  # NaN is passed over
    low = torch.where(g.w < 0, -g.w, 0.0).amax(2)
    base = half / high.maximum(low)
    if signs != "positive":
        base = torch.where(high < low, base, -base)
    best, gain = torch.zeros_like(base), torch.zeros_like(base)
    for start in (base, -base) if signs == "both" else (base,):
        for factor in factors:
            s, explained = fitted(g, start * factor, half)
            best, gain = torch.where(explained > gain, s, best), torch.where(explained > gain, explained, gain)
    for _ in range(sweeps):
        best = fitted(g, 1.0 / best, half)[0]
    new = stored(best, scale)
    before, after = loss(g, old, half), loss(g, new, half)
    better = (new.abs() >= least) & new.isfinite() & (after < before)
    return Found(torch.where(better, new, old), before, torch.where(better, after, before))
