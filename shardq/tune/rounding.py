"""Codes whose rounding is learned: what a grid of numbers is, and how a loss changes with V and with the factors of
scales.

Source: W. Cheng et al., arXiv:2309.05516, in the form of auto-round 0.16.1: a code is that of w / scale + V under the
scale of an extreme times a factor. A kind of scheme is a grid of its own: `rounding_integers`, `rounding_floats`.
A grid's own methods are for all rows at once; what learns goes through them tile by tile (`rounding_tiles`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from shardq.errors import BadOption
from shardq.quantizers.quantized import Quantized
from shardq.schemes import Scheme
from shardq.tune.rounding_floats import make_floats
from shardq.tune.rounding_integers import make_integers
from shardq.tune.rounding_parts import Kept, Part, Rounded

if TYPE_CHECKING:
    from shardq.kernels import KernelSet


class Grid(Protocol):
    """Weights in groups, and the numbers that they may become. V and values are [..., columns of a group], where zeros
    fill a short last group of a row."""

    @property
    def source(self) -> Tensor:
        """The weight [rows, columns], in any type of floats, whose numbers must stay as they are."""

    @property
    def weight(self) -> Tensor:
        """The same in the form of V, fp32, made anew."""

    @property
    def form(self) -> tuple[int, ...]:
        """The shape of V."""

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
    def is_finite(self) -> bool:
        """False where the weight holds NaN or infinity."""

    @property
    def stored(self) -> str:
        """The format of scales."""

    def lines(self, rows: slice) -> slice:
        """Where rows lie along the first axis of V."""

    def by_rows(self, factors: Sequence[Tensor]) -> tuple["Grid", tuple[Tensor, ...]]:
        """The same numbers with a scale for each row's groups, and factors of these, which `lines` fits, too."""

    def part(self, rows: slice) -> "Grid":
        """Some of the rows, where none shares a scale with another (`by_rows`)."""

    def round(self, v: Tensor, *factors: Tensor) -> Rounded:
        """The nearest numbers."""

    def values(self, r: Rounded) -> Tensor:
        """What these stand for, in the form of V, fp32."""

    def pull(self, grad: Tensor, v: Tensor, factors: Sequence[Tensor], r: Rounded) -> tuple[Tensor, ...]:
        """The gradient of V from that of `values`, and by groups of rows what `gather` makes those of factors of."""

    def gather(self, sums: Sequence[Tensor], factors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Gradients of factors, from what `pull` has made of all rows."""

    def room_for_codes(self) -> Tensor:
        """What `keep` makes of all rows, without content."""

    def keep(self, v: Tensor, r: Rounded) -> Tensor:
        """Codes in a byte each or less, [rows, ...], on the device of the weight."""

    def take_codes(self, kept: Kept, rows: slice, kernels: "KernelSet") -> Quantized:
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


def check_scheme(scheme: Scheme) -> None:
    """Raises BadOption for a scheme whose codes and scales are found together."""
    if scheme.block:
        raise BadOption(f"SignRound needs scales before codes, and {scheme.name} has both at once")


def make_grid(
    weight: Tensor, scheme: Scheme, dtype: str, parts: Sequence[Part] = (), ends: tuple[Tensor, Tensor] | None = None
) -> Grid:
    """The grid of a weight [rows, columns], floats of any type, that the checkpoint has in `dtype`: one matrix, or
    several that `parts` names. It is kept, not copied. `ends`: of narrower ranges of its groups, [rows, groups]
    (auto-round's awq_clip_min and awq_clip_max, which its MX and NVFP4 do not look at). Raises as `check_scheme`."""
    check_scheme(scheme)
    if scheme.format.is_integer:
        return make_integers(weight, scheme, dtype, ends)
    return make_floats(weight, scheme, dtype, parts or (Part(slice(0, len(weight)), None),), ends)


def begin_learning(grid: Grid, factors: bool) -> Learned:
    """Where round-to-nearest is: V of 0, and factors of 1, which move or stay."""
    return Learned(
        torch.zeros(grid.form, device=grid.source.device, requires_grad=True),
        tuple(torch.ones_like(e, requires_grad=factors) for e in grid.extremes),
    )
