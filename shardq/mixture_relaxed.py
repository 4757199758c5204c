"""A first choice for a mixture, and how much less damage any other can have: convex hulls of the options, and the
linear relaxation (Sinha and Zoltners, "The multiple-choice knapsack problem", Operations Research 27, 1979)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeVar

from shardq.mixture import NO_OPTION, Item, Option

if TYPE_CHECKING:  # planning needs no arrays, and numpy takes a tenth of a second to load
    import numpy as np
    from numpy.typing import NDArray

    Ints = NDArray[np.int64]
    Floats = NDArray[np.float64]
    Number = TypeVar("Number", bound=np.generic)

ERROR: Final = 2.0**-50  # relative error of a reduced cost


@dataclass(frozen=True, slots=True)
class Problem:
    """Items by name, options by cost, then damage, then name."""

    costs: "Ints"  # [items, options]
    damages: "Floats"  # the same; infinite where an item has fewer options, and where one before has the same cost
    order: "Ints"  # position of each option in its item


@dataclass(frozen=True, slots=True)
class Relaxed:
    """The best choice for a price per bit, at the price where the budget is just kept."""

    columns: "Ints"  # [items], columns of the problem
    price: float  # damage that a bit is worth; 0 where bits are left over
    slack: int  # bits that the choice leaves of the budget, as far as any sum of costs can use them


@dataclass(frozen=True, slots=True)
class Core:
    """Reduced costs: what an option costs more than the relaxed choice's, bits at their price included."""

    steps: "Ints"  # [items, options]: bits more than the relaxed choice
    harms: "Floats"  # damage more than it
    reduced: "Floats"  # harm and price of the step, as small as rounding may have left it; never below 0
    excess: float  # damage by which the relaxed choice is above the bound: what its slack is worth


def read_items(items: Sequence[Item]) -> Problem:
    """The problem of items that are in the order of their names, one at least."""
    import numpy as np

    width = max(len(i.options) for i in items)
    by_name = {id(i.options): i.options for i in items}  # many items share them
    orders = {key: _name_order(options, width) for key, options in by_name.items()}
    order = np.array([orders[id(i.options)] for i in items], np.int64)
    costs = np.array([i.bits + (NO_OPTION,) * (width - len(i.bits)) for i in items], np.int64)
    damages = np.array([i.damages + (math.inf,) * (width - len(i.damages)) for i in items], np.float64)
    for keys in (damages, costs):  # stable, so that the last sort counts most
        sorting = np.argsort(np.take_along_axis(keys, order, axis=1), axis=1, kind="stable")
        order = np.take_along_axis(order, sorting, axis=1)
    costs, damages = np.take_along_axis(costs, order, axis=1), np.take_along_axis(damages, order, axis=1)
    damages[:, 1:][np.diff(costs, axis=1) == 0] = math.inf  # of options with equal bits the first is the best
    return Problem(costs, damages, order)


def _name_order(options: Sequence[Option], width: int) -> tuple[int, ...]:
    return (*sorted(range(len(options)), key=lambda c: options[c].name), *range(len(options), width))


def pick(values: "NDArray[Number]", columns: "Ints") -> "NDArray[Number]":
    """One value of each row."""
    import numpy as np

    return np.take_along_axis(values, columns[:, None], axis=1)[:, 0]


def _hull(problem: Problem) -> tuple["Ints", "Floats"]:
    """The lower convex hull of each item's (bits, damage): its corners [items, options], cheapest first, and the damage
    that each bit saves on the way to the next corner [items, options - 1], never rising; 0 where there is none."""
    import numpy as np

    costs, damages = problem.costs, problem.damages
    count, width = costs.shape
    corners, slopes = np.zeros((count, width), np.int64), np.zeros((count, width - 1))
    before = np.full(count, math.inf)
    for k in range(width - 1):
        at = corners[:, k, None]
        more = costs - np.take_along_axis(costs, at, axis=1)
        saved = np.take_along_axis(damages, at, axis=1) - damages
        slope = np.where((more > 0) & (saved > 0), saved / np.maximum(more, 1), 0.0)
        farthest = width - 1 - np.argmax(slope[:, ::-1], axis=1)
        best = slope.max(axis=1)
        corners[:, k + 1] = np.where(best > 0, farthest, corners[:, k])
        before = slopes[:, k] = np.minimum(best, before)  # rounding must not let a later edge be taken first
    return corners, slopes


def relax(problem: Problem, budget_bits: int) -> Relaxed:
    """Edges of the hulls, the steepest first and by name where equal, as far as the budget goes."""
    import numpy as np

    costs = problem.costs
    corners, slopes = _hull(problem)
    stops = np.take_along_axis(costs, corners, axis=1)
    room = _usable(problem, budget_bits - int(costs[:, 0].sum()))
    flat = slopes.ravel()
    edges = np.flatnonzero(flat > 0)
    edges = edges[np.argsort(-flat[edges], kind="stable")]
    spent = np.cumsum(np.diff(stops, axis=1).ravel()[edges])
    taken = int(np.searchsorted(spent, room, side="right"))
    steps = np.bincount(edges[:taken] // max(1, slopes.shape[1]), minlength=len(costs))
    price = float(flat[edges[taken]]) if taken < len(edges) else 0.0
    return Relaxed(pick(corners, steps), price, room - (int(spent[taken - 1]) if taken else 0))


def _usable(problem: Problem, room: int) -> int:
    """`room` rounded down to what steps between options can add up to: a multiple of their greatest common divisor."""
    import numpy as np

    steps = np.where(np.isfinite(problem.damages), problem.costs - problem.costs[:, :1], 0)
    unit = int(np.gcd.reduce(steps, axis=None))
    return room // unit * unit if unit else 0


def reduce_costs(problem: Problem, relaxed: Relaxed) -> Core:
    """What each option costs beside the relaxed choice, which has 0; infinite for options that are none."""
    import numpy as np

    has, at = np.isfinite(problem.damages), relaxed.columns[:, None]
    steps = np.where(has, problem.costs - np.take_along_axis(problem.costs, at, axis=1), 0)
    harms = np.where(has, problem.damages - np.take_along_axis(problem.damages, at, axis=1), 0.0)
    priced = relaxed.price * steps
    reduced = np.where(has, harms + priced - ERROR * (np.abs(harms) + np.abs(priced)), math.inf)
    np.put_along_axis(reduced, at, 0.0, axis=1)
    below = np.minimum(reduced.min(axis=1), 0.0)
    excess = relaxed.price * relaxed.slack - math.fsum(below[below < 0].tolist())
    return Core(steps, harms, np.maximum(reduced, 0.0), excess)
