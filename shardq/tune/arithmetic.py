"""What learning computes of a grid again and again: as torch does it operation by operation, or compiled."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from torch import Tensor

from shardq.tune.rounding import Grid


@dataclass(frozen=True, slots=True)
class Arithmetic:
    """How it is computed."""

    values: Callable[[Grid, Tensor, Sequence[Tensor]], Tensor]  # of V and factors
    pull: Callable[[Grid, Tensor, Tensor, Sequence[Tensor]], tuple[Tensor, ...]]  # of a gradient, V and factors


def round_values(grid: Grid, v: Tensor, factors: Sequence[Tensor]) -> Tensor:
    """What the nearest codes stand for, in the form of V, fp32."""
    return grid.values(grid.round(v, *factors))


def pull_back(grid: Grid, grad: Tensor, v: Tensor, factors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """What `Grid.pull` makes of the gradient of `round_values`."""
    return grid.pull(grad, v, factors, grid.round(v, *factors))


EAGER: Final = Arithmetic(round_values, pull_back)
