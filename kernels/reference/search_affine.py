"""Scales and zero points, or biases, of affine codes by weighted least squares, as formulas."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from shardq.kernels.reference.searches import Groups, level, stored


@dataclass(frozen=True, slots=True)
class Line:
    """w is about scale * q + low, or scale * (q - low) where `low` is a zero point; each [rows, G]."""

    scale: torch.Tensor
    low: torch.Tensor

    def where(self, chosen: torch.Tensor, other: "Line") -> "Line":
        """This line where `chosen`, else the other."""
        return Line(torch.where(chosen, self.scale, other.scale), torch.where(chosen, self.low, other.low))


@dataclass(frozen=True, slots=True)
class Found:
    """Lines and both weighted errors, [rows, G]: under the old lines and under these."""

    line: Line
    before: torch.Tensor
    after: torch.Tensor


def fitted(g: Groups, line: Line, top: float) -> Line:
    """The line that fits the codes of a line best; that line where its codes are all the same."""
    q = level((g.w - line.low[..., None]) * (1.0 / line.scale)[..., None], 0.0, top)
    weight, product = g.sum(g.e), g.sum(g.e * g.w)
    eq = g.e * q
    first, square, mixed = g.sum(eq), g.sum(eq * q), g.sum(q * (g.e * g.w))
    determinant = weight * square - first * first
    scale = (weight * mixed - first * product) / determinant
    low = (product - scale * first) / weight
    return Line(scale, low).where(determinant > 0, line)


def with_zero_points(g: Groups, line: Line, top: float) -> Line:
    """The nearest whole zero point, and the scale that fits the codes with it best."""
    zero = level(-line.low / line.scale, 0.0, top)
    lowest, highest = -zero[..., None], (top - zero)[..., None]
    q = level(g.w * (1.0 / line.scale)[..., None], lowest, highest)
    return Line(g.sum(q * (g.e * g.w)) / g.sum((g.e * q) * q), zero)


def loss(g: Groups, line: Line, top: float, rule: str, divide: bool) -> torch.Tensor:
    """Weighted error under numbers as they are stored."""
    steps, low = line.scale[..., None], line.low[..., None]
    w = g.w if rule == "zero" else g.w - low
    quotient = w / steps if divide else w * (1.0 / steps)
    if rule == "zero":
        difference = g.w - steps * level(quotient, -low, top - low)
    else:
        difference = g.w - (steps * level(quotient, 0.0, top) + low)
    return g.sum((difference * difference) * g.e)


def extremes(g: Groups, rule: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Smallest and largest weight [rows, G], 0 between them for zero points; NaN is passed over."""
    edge = 0.0 if rule == "zero" else torch.inf
    low = torch.where(g.there & ~g.w.isnan(), g.w, edge).amin(2)
    high = torch.where(g.there & ~g.w.isnan(), g.w, -edge).amax(2)
    return low.clamp(max=edge), high.clamp(min=-edge)


def search(
    g: Groups, old: Line, bits: int, factors: Sequence[torch.Tensor], rule: str, sweeps: int, scale: str, least: float
) -> Found:
    """See KernelSet.search_affine."""
    top = float((1 << bits) - 1)
    low, high = extremes(g, rule)
    best, reached = old, torch.full_like(old.scale, torch.inf)
    for factor in factors:
        line = Line((high * factor - low * factor) / top, low * factor)
        for _ in range(sweeps):
            line = fitted(g, line, top)
        if rule == "zero":
            line = with_zero_points(g, line, top)
        line = Line(stored(line.scale, scale), line.low if rule == "zero" else stored(line.low, scale))
        error = loss(g, line, top, rule, divide=False)
        valid = (line.scale.abs() >= least) & line.scale.isfinite() & line.low.isfinite()
        better = valid & (error < reached)
        best, reached = line.where(better, best), torch.where(better, error, reached)
    before, after = (loss(g, line, top, rule, divide=True) for line in (old, best))
    return Found(best.where(after < before, old), before, torch.where(after < before, after, before))
