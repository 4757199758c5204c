"""Scales or biases that move for a smaller mean error, as formulas."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from shardq.kernels.reference.arrays import grouped
from shardq.kernels.reference.elements import FLOATS, float_codes, float_values
from shardq.kernels.reference.search_affine import Line
from shardq.kernels.reference.searches import Groups, checked_importance, level, stored


@dataclass(frozen=True, slots=True)
class Centered:
    """Numbers, or codes of scales, [rows, G], which rows moved [rows], and the weighted errors of groups under what
    moved [rows, G]."""

    numbers: torch.Tensor
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
    g: Groups, line: Line, bits: int, inputs: tuple[torch.Tensor, torch.Tensor], rule: str, scale: str, least: float
) -> Centered:
    """See KernelSet.center_groups; `inputs` are the `columns`."""
    spread, means = inputs
    old = line.scale if rule == "zero" else line.low
    p, r = _patterns(g, line, float((1 << bits) - 1), rule)
    shift, rest = g.sum(means * p), g.sum(means * r)
    by_spread = _parts(g, spread, p, r)
    a, b = by_spread.squares, by_spread.products
    any_code, zero = a > 0, torch.zeros_like(a)
    error = _added(rest)
    stiffness = _added(torch.where(any_code, shift * (shift / a), zero))
    drift = _added(torch.where(any_code, shift * (b / a), zero))
    force = (error - drift) / (1.0 + stiffness)
    new = stored(old + (b + force[:, None] * shift) / a, scale)
    allowed = new.isfinite()
    if rule == "zero":
        allowed &= (new.abs() >= least) & (new.signbit() == old.signbit())
    new = torch.where(allowed, new, old)
    left = error - _added((new - old) * shift)
    moved = _added(by_spread.after(new - old)) + left * left < _added(by_spread.errors) + error * error
    lost = _parts(g, g.e, p, r).after(new - old)
    return Centered(torch.where(moved[:, None], new, old), moved, torch.where(lost > 0, lost, zero))


@dataclass(frozen=True, slots=True)
class _Parts:
    """Sums over groups [rows, G], of which the squared error is made under a number that moved."""

    squares: torch.Tensor  # of patterns
    products: torch.Tensor  # of patterns and what is left of weights
    errors: torch.Tensor  # of what is left: the squared error before

    def after(self, step: torch.Tensor) -> torch.Tensor:
        """The squared error once numbers moved by `step` [rows, G]."""
        return self.errors + step * (step * self.squares - (self.products + self.products))


def _parts(g: Groups, weights: torch.Tensor, p: torch.Tensor, r: torch.Tensor) -> _Parts:
    return _Parts(g.sum((weights * p) * p), g.sum((weights * p) * r), g.sum((weights * r) * r))


def center_ladder(
    g: Groups, element: str, ladder: torch.Tensor, inputs: tuple[torch.Tensor, torch.Tensor], first: torch.Tensor,
    last: torch.Tensor, chosen: torch.Tensor,
) -> Centered:  # fmt: skip
    """See KernelSet.center_ladder; `inputs` are the `columns`, all behind them int64 [rows, G]."""
    spread, means = inputs
    span = range(max(1, int((last - first).max()) + 1))
    tried = torch.stack([chosen, *((first + i).minimum(last).clamp(min=0) for i in span)])
    there = torch.stack([torch.ones_like(chosen) == 1, *(first + i <= last for i in span)])
    squares, parts = torch.empty(tried.shape), torch.empty(tried.shape)
    for i, codes in enumerate(tried):
        d = _excess(g, element, ladder[codes])
        squares[i] = g.sum((d * d) * spread)
        parts[i] = g.sum(torch.where(g.w.signbit(), -d, d) * means)
    start = mean = _added(parts[0])
    best = torch.zeros_like(chosen)
    for k in range(chosen.shape[1]):
        rest = mean - parts[0, :, k]
        wholes = rest + parts[:, :, k]
        costs = squares[:, :, k] + wholes * wholes
        others = torch.where(there[1:, :, k] & (costs[1:] < costs[0]), costs[1:], torch.inf)
        best[:, k] = torch.where((others < torch.inf).any(0), others.argmin(0) + 1, 0)
        mean = rest + parts[:, :, k].gather(0, best[None, :, k])[0]
    out, kept = (x.gather(0, best[None])[0] for x in (tried, squares))
    moved = _added(kept) + mean * mean < _added(squares[0]) + start * start
    d = _excess(g, element, ladder[out])
    return Centered(torch.where(moved[:, None], out, chosen), moved, g.sum((d * d) * g.e))


def _excess(g: Groups, element: str, scales: torch.Tensor) -> torch.Tensor:
    """What weights [rows, G, width] are more than their codes under scales [rows, G] say, away from zero."""
    form, size, steps = FLOATS[element], g.w.abs(), scales[..., None]
    quotient = size / steps
    quotient = torch.where(quotient < form.largest, quotient, form.largest)
    return size - steps * float_values(float_codes(quotient, form), form)


def _patterns(g: Groups, line: Line, top: float, rule: str) -> tuple[torch.Tensor, torch.Tensor]:
    """What the number that moves is multiplied by [rows, G, width], and what is left of weights as it is."""
    steps, low = line.scale[..., None], line.low[..., None]
    if rule == "zero":
        p = level(g.w / steps, -low, top - low)
        return p, g.w - steps * p
    return torch.ones_like(g.w), (g.w - steps * level((g.w - low) / steps, 0.0, top)) - low


def _added(x: torch.Tensor) -> torch.Tensor:
    """fp32 sums of [rows, G] over groups, in order."""
    with np.errstate(all="ignore"):
        return torch.from_numpy(np.add.accumulate(x.numpy(), axis=1)[:, -1] + np.float32(0))
