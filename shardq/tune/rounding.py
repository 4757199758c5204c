"""Codes whose rounding is learned: what a grid of numbers is, and how a loss changes with V and with the factors of
scales.

Source: W. Cheng et al., arXiv:2309.05516, in the form of auto-round 0.16.1: a code is that of w / scale + V under the
scale of an extreme times a factor. A kind of scheme is a grid of its own: `rounding_integers`, `rounding_floats`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from shardq.errors import BadOption
from shardq.quantizers.quantized import Quantized
from shardq.schemes import Scheme
from shardq.tune.rounding_floats import make_floats
from shardq.tune.rounding_integers import make_integers
from shardq.tune.rounding_parts import Part, Rounded

if TYPE_CHECKING:
    from shardq.kernels import KernelSet


class Grid(Protocol):
    """Weights in groups, and the numbers that they may become. V and values are [..., columns of a group], where zeros
    fill a short last group of a row."""

    @property
    def weight(self) -> Tensor:
        """In the form of V, fp32."""

    @property
    def rows(self) -> int:
        """Of the weight."""

    @property
    def columns(self) -> int:
        """Of a row, without what fills its last group."""

    @property
    def extremes(self) -> tuple[Tensor, ...]:
        """What is multiplied by factors of the same shape, from 0 to 1."""

    @property
    def stored(self) -> str:
        """The format of scales."""

    def round(self, v: Tensor, *factors: Tensor) -> Rounded:
        """The nearest numbers."""

    def values(self, r: Rounded) -> Tensor:
        """What these stand for, in the form of V, fp32."""

    def pull(self, grad: Tensor, v: Tensor, factors: Sequence[Tensor], r: Rounded) -> tuple[Tensor, ...]:
        """Gradients of V and of the factors, from that of `values`."""

    def take_codes(self, v: Tensor, r: Rounded, rows: slice, kernels: "KernelSet") -> Quantized:
        """Canonical codes of some of the rows, all of one part."""


@dataclass(frozen=True, slots=True)
class Learned:
    """What is learned of a weight."""

    v: Tensor
    factors: tuple[Tensor, ...]

    @property
    def all(self) -> tuple[Tensor, ...]:
        """V first."""
        return (self.v, *self.factors)

    def copied(self) -> "Learned":
        """As it is now."""
        return Learned(self.v.detach().clone(), tuple(f.detach().clone() for f in self.factors))


def check_scheme(scheme: Scheme) -> None:
    """Raises BadOption for a scheme whose codes and scales are found together."""
    if scheme.block:
        raise BadOption(f"SignRound needs scales before codes, and {scheme.name} has both at once")


def make_grid(
    weight: Tensor, scheme: Scheme, dtype: str, parts: Sequence[Part] = (), ends: tuple[Tensor, Tensor] | None = None
) -> Grid:
    """The grid of a weight [rows, columns], fp32, that the checkpoint has in `dtype`: one matrix, or several that
    `parts` names. `ends`: of narrower ranges of its groups, [rows, groups] (auto-round's awq_clip_min and
    awq_clip_max, which its MX and NVFP4 do not look at). Raises as `check_scheme`."""
    check_scheme(scheme)
    if scheme.format.is_integer:
        return make_integers(weight, scheme, dtype, ends)
    return make_floats(weight, scheme, dtype, parts or (Part(slice(0, len(weight)), None),), ends)


def begin_learning(grid: Grid, factors: bool) -> Learned:
    """Where round-to-nearest is: V of 0, and factors of 1, which move or stay."""
    return Learned(
        torch.zeros_like(grid.weight, requires_grad=True),
        tuple(torch.ones_like(e, requires_grad=factors) for e in grid.extremes),
    )


def values_of(grid: Grid, learned: Learned) -> Tensor:
    """The weight [rows, columns], fp32, which gradients flow through."""
    made: Tensor = RoundingGradient.apply(grid, *learned.all)  # type: ignore[no-untyped-call]
    return made.reshape(grid.rows, -1)[:, : grid.columns]


class RoundingGradient(torch.autograd.Function):
    """`values` of what `round` makes, with the gradients of V and of the factors; the weight has none."""

    @staticmethod
    def forward(ctx: Any, grid: Grid, v: Tensor, *factors: Tensor) -> Tensor:
        """Values in the form of V."""
        r = grid.round(v, *factors)
        ctx.save_for_backward(v, *factors)
        ctx.grid, ctx.rounded = grid, r
        return grid.values(r)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """By the chain rule, as the grid has it."""
        (grad,) = grads
        v, *factors = ctx.saved_tensors
        grid: Grid = ctx.grid
        return None, *grid.pull(grad, v, factors, ctx.rounded)
