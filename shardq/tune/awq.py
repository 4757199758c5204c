"""AWQ's arithmetic: how strongly columns of a matrix are scaled up before they get codes, and where groups are clipped.

Source: J. Lin et al., arXiv:2306.00978, as auto-round 0.16.1 does it (`algorithms/transforms/awq/base.py`): candidates
are powers of the mean magnitude of a column's inputs, over the complementary power of how large the column is in its
groups ("duo"); the first candidate scales nothing.
"""

from collections.abc import Iterable
from typing import Final

import torch
from torch import Tensor

NEAR_ZERO: Final = 1e-4  # least factor, and what is added to means of weights
LEAST_GROUP: Final = 1e-6  # added to a group's largest magnitude
CLIP_GRID: Final = 20  # steps of a group's largest magnitude
CLIP_STEPS: Final = 10  # of them that are tried: down to 0.55


def mean_weights(matrices: Iterable[tuple[Tensor, int]]) -> Tensor:
    """How large each column is, as a part of the largest magnitude of its group, 0 to 1: the mean over the rows of
    matrices [rows, columns], each with the columns of its groups. A group of zeros counts 0."""
    parts = []
    for weight, group in matrices:
        grouped = in_groups(weight.detach().float().abs(), group)
        share = grouped / (grouped.amax(2, keepdim=True) + LEAST_GROUP)
        parts.append(share.reshape(len(weight), -1)[:, : weight.shape[1]])
    return torch.cat(parts).mean(0)


def factors_of(inputs: Tensor, weights: Tensor, ratio: float, duo: bool) -> Tensor:
    """Factors of columns, fp32 [columns], whose largest is as far above 1 as the least is below; `inputs`: mean
    magnitudes of what comes in, `weights`: of `mean_weights`. What is not finite becomes 1."""
    powers = inputs.pow(ratio)
    found = (powers / (weights.pow(1 - ratio) + NEAR_ZERO) if duo else powers).clamp(min=NEAR_ZERO)
    found = found / (found.max() * found.min()).sqrt()
    return torch.where(found.isfinite(), found, 1.0)


def split_norm(norm: Tensor, adds: float, factors: Tensor, stored: torch.dtype) -> tuple[Tensor, Tensor]:
    """A norm's weights [columns] divided by factors, as `stored` has them, and by what that has really divided, fp32:
    columns that are multiplied by the latter make up for it to the last digit of fp32. `adds`: what the norm adds to
    its weights (1 in Gemma's). Where weights multiply by nothing, or would then, both stay as they are."""
    before = norm.float() + adds
    made = _through((before / factors - adds), stored, norm.dtype)
    behind = made.float() + adds
    ratio = before / behind
    usable = ratio.isfinite() & (ratio > 0)
    return torch.where(usable, made, norm.to(stored)), torch.where(usable, ratio, 1.0)


def split_bias(bias: Tensor, factors: Tensor, stored: torch.dtype) -> Tensor:
    """A bias [columns] divided by factors, as `stored` has it."""
    return _through(bias.float() / factors, stored, bias.dtype)


def _through(values: Tensor, stored: torch.dtype, computed: torch.dtype) -> Tensor:
    """As they are stored, and no finer than what is computed with, so that what is served is what was evaluated."""
    return values.to(stored).to(computed).to(stored)


class Products:
    """What comes into a matrix, as far as squares of outputs need it: all of it [tokens, columns], or where that is
    less the sum of x x^T."""

    def __init__(self) -> None:
        self._rows: list[Tensor] = []
        self._sum: Tensor | None = None
        self.tokens = 0

    def add(self, rows: Tensor) -> None:
        """Some tokens, [..., columns]."""
        x = rows.detach().reshape(-1, rows.shape[-1]).float()
        self.tokens += len(x)
        self._rows.append(x)
        if self.tokens > x.shape[1]:
            whole = torch.cat(self._rows)
            self._sum = whole.T @ whole if self._sum is None else self._sum.addmm_(whole.T, whole)
            self._rows = []

    def squares(self, change: Tensor) -> float:
        """Sum of squares of x times a change [rows, columns] of the matrix, over all tokens."""
        total = sum(float((x @ change.T).square().sum(dtype=torch.float64)) for x in self._rows)
        if self._sum is not None:
            total += float(((change @ self._sum) * change).sum(dtype=torch.float64))
        return total


class GroupProducts:
    """The same for parts of outputs, of one group of columns each: sums of x x^T [groups, columns, columns of a group];
    a short last group is filled with zeros."""

    def __init__(self, group: int) -> None:
        self._group = group
        self._sum: Tensor | None = None

    def add(self, rows: Tensor) -> None:
        """Some tokens, [..., columns]."""
        grouped = in_groups(rows.detach().reshape(-1, rows.shape[-1]).float(), self._group)
        found = torch.einsum("tgi,tgj->gij", grouped, grouped)
        self._sum = found if self._sum is None else self._sum.add_(found)

    def squares(self, change: Tensor, factors: Tensor) -> Tensor:
        """Sums of squares [rows, groups] for a change [rows, groups, columns of a group] of the matrix, whose inputs
        are divided by factors [columns]."""
        assert self._sum is not None
        divided = change / in_groups(factors[None], self._group).clamp(min=torch.finfo(torch.float32).tiny)
        by_group = divided.transpose(0, 1)
        return ((by_group @ self._sum) * by_group).sum(2).T


def in_groups(rows: Tensor, group: int) -> Tensor:
    """[rows, columns] as [rows, groups, columns of a group], with zeros behind a short last one."""
    return torch.nn.functional.pad(rows, (0, -rows.shape[1] % group)).reshape(len(rows), -1, group)


def range_at(grouped: Tensor, symmetric: bool, step: int) -> tuple[Tensor, Tensor]:
    """Ends of the range of each group [rows, groups, 1] of weights [rows, groups, columns of a group] at a step of the
    clipping, 0 to CLIP_STEPS - 1: all of it, and so much less that 0.55 is left at the last."""
    shrink = 1 - step / CLIP_GRID
    if symmetric:
        high = grouped.abs().amax(2, keepdim=True) * shrink
        return -high, high
    low, high = grouped.amin(2, keepdim=True), grouped.amax(2, keepdim=True)
    return low.clamp(max=0) * shrink, high.clamp(min=0) * shrink
