"""Which scheme each part of a model gets, for the least damage within a budget of bits: the multiple-choice knapsack.

An item is what must share one scheme (a fused group, the routed experts of a layer, or one matrix). Each of its options
has a cost in bits and a damage, and damages add up. `optimize` finds the choice of least damage whose bits stay within
the budget, and proves it: convex hulls of the options and the linear relaxation (Sinha and Zoltners, "The
multiple-choice knapsack problem", Operations Research 27, 1979) give a first choice and a bound; a dynamic program over
the items whose options can still matter closes the gap between the two (Pisinger, "A minimal algorithm for the
multiple-choice knapsack problem", European Journal of Operational Research 83, 1995: an expanding core, states without
those that others dominate, and bounds from the slopes of what is left).

Pure: the result depends on the values of the items alone, not on their order, on hashes or on time.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from typing import TYPE_CHECKING, Final, TypeVar

from shardq.errors import BadOption
from shardq.schemes import Scheme

if TYPE_CHECKING:  # planning needs no arrays, and numpy takes a tenth of a second to load
    import numpy as np
    from numpy.typing import NDArray

    Ints = NDArray[np.int64]
    Floats = NDArray[np.float64]
    Flags = NDArray[np.bool_]
    Number = TypeVar("Number", bound=np.generic)

WINDOW: Final = Fraction(5, 1000)  # of a target that the average may stay below it
TOLERANCE: Final = 2.0**-40  # of the damage: what fp64 may have lost when a choice is called the best
MAX_STATES: Final = 50_000  # partial choices that are followed at a time
MAX_STORED: Final = 20_000_000  # partial choices that are remembered, six bytes each
MAX_STAGES: Final = 20_000  # items that the dynamic program looks at
_NO_OPTION: Final = 1 << 61  # bits of options that an item does not have
_SUM_BITS: Final = 61  # damages are summed as integers of so many bits
_ERROR: Final = 2.0**-50  # relative error of a reduced cost


@dataclass(frozen=True, slots=True)
class Option:
    """One way to store an item."""

    name: str  # of the scheme, as a layer config takes it
    scheme: Scheme | None  # None: kept in source precision


@dataclass(frozen=True, slots=True)
class Item:
    """Tensors that share one option. One with a single option is fixed: its bits count, and there is no choice."""

    name: str
    kind: str  # what it is, for tables: `down_proj`, `q_proj+k_proj+v_proj`
    modules: tuple[str, ...]
    weights: int  # numbers that it holds
    options: tuple[Option, ...]
    bits: tuple[int, ...]  # of all its tensors, for each option
    damages: tuple[float, ...]  # for each option; they add up over items

    def __post_init__(self) -> None:
        """Refuse what cannot be weighed. Raises BadOption."""
        if not len(self.options) == len(self.bits) == len(self.damages) >= 1:
            raise BadOption(f"{self.name} needs bits and a damage for each of its {len(self.options)} options")
        for o, bits, damage in zip(self.options, self.bits, self.damages, strict=True):
            if not 0 <= bits < _NO_OPTION or not 0.0 <= damage < math.inf:
                raise BadOption(
                    f"{self.name} under {o.name}: {bits} bits, damage {damage}: expected finite numbers, none negative"
                )


@dataclass(frozen=True, slots=True)
class Mixture:
    """A choice, and how good it is."""

    choice: Mapping[str, Option]  # item -> its option, in the order of names
    budget_bits: int
    bits: int  # never more than the budget
    weights: int
    damage: float  # sum over items
    bound: float  # no choice within the budget has less damage than this; `damage` itself where that is proven

    @property
    def average_bits(self) -> float:
        """Bits for each weight; 0 where there is none."""
        return self.bits / self.weights if self.weights else 0.0

    @property
    def gap(self) -> float:
        """By how much of its damage, at most, another choice may be better; 0 where this one is proven to be best (but
        for the rounding of fp64: a part in 2^40)."""
        missing = self.damage - self.bound
        return missing / self.damage if missing > TOLERANCE * self.damage else 0.0

    @property
    def is_proven(self) -> bool:
        """True if no choice within the budget is better."""
        return self.gap == 0.0


def find_budget(items: Sequence[Item], target_bits: float) -> int:
    """Bits that an average of `target_bits` for each weight allows all items together, rounded down.

    Raises BadOption for a target that no choice comes near: below the least average that the options allow, or so far
    above the largest that this is not within 0.5 % of it; for one that is not finite, and where there are no weights.
    """
    weights = sum(i.weights for i in items)
    if not weights:
        raise BadOption("there is nothing to choose schemes for: no item has weights")
    least, largest = _averages(items)
    if not math.isfinite(target_bits) or target_bits < least or largest < target_bits * float(1 - WINDOW):
        raise BadOption(
            f"a target of {target_bits:g} bits for each weight cannot be met: the options allow averages from "
            f"{least:.4f} to {largest:.4f}; choose a target between them, or other --options"
        )
    return math.floor(Fraction(target_bits) * weights)


def choose(items: Sequence[Item], target_bits: float) -> Mixture:
    """The choice of least damage whose average is at most `target_bits` for each weight, and no more than 0.5 % below
    where some choice is; with few items that may cost damage, which `optimize` alone does not allow. Raises BadOption
    as `find_budget` and `optimize` do."""
    budget_bits = find_budget(items, target_bits)
    return optimize(items, budget_bits, math.ceil(budget_bits * (1 - WINDOW)))


def optimize(items: Sequence[Item], budget_bits: int, floor_bits: int = 0) -> Mixture:
    """The choice of least damage among those of at most `budget_bits`, proven to be so wherever that is feasible.

    Of equally good choices one is taken in a fixed way: items in the order of their names, options by bits and then
    names. With `floor_bits` the choice uses at least so many bits where some choice does, even if that costs damage;
    that is looked for only where the best choice of all has fewer, and given up where too many sums of bits are
    possible. Damages are compared to a part in 2^40 of their sum. Work and memory are bounded by numbers of partial
    choices, never by time; where they end first, `bound` says what is proven. Raises BadOption for a budget below the
    least possible, with the least and the largest average; and for two items of one name.
    """
    ordered = sorted(items, key=lambda i: i.name)
    if twice := next((a.name for a, b in pairwise(ordered) if a.name == b.name), None):
        raise BadOption(f"two items are called {twice}: an item is chosen for by its name")
    if not ordered:
        return Mixture({}, budget_bits, 0, 0, 0.0, 0.0)
    problem = _read(ordered)
    if budget_bits < int(problem.costs[:, 0].sum()):
        weights = sum(i.weights for i in items)
        least, largest = _averages(items)
        raise BadOption(
            f"a budget of {budget_bits} bits ({budget_bits / max(1, weights):.4f} for each weight) is too small: the "
            f"options allow averages from {least:.4f} to {largest:.4f} bits"
        )
    columns, bound = _solve(problem, budget_bits)
    bits = _pick(problem.costs, columns).sum()
    if bits < floor_bits and (filled := _fill(problem, budget_bits, floor_bits)) is not None:
        columns = filled
    originals = _pick(problem.order, columns).tolist()
    damage = math.fsum(i.damages[c] for i, c in zip(ordered, originals, strict=True))
    return Mixture(
        {i.name: i.options[c] for i, c in zip(ordered, originals, strict=True)},
        budget_bits,
        sum(i.bits[c] for i, c in zip(ordered, originals, strict=True)),
        sum(i.weights for i in ordered),
        damage,
        damage if bound is None else min(damage, bound),
    )


def _averages(items: Sequence[Item]) -> tuple[float, float]:
    weights = max(1, sum(i.weights for i in items))
    return sum(min(i.bits) for i in items) / weights, sum(max(i.bits) for i in items) / weights


# --- the first choice ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Problem:
    """Items by name, options by cost, then damage, then name."""

    costs: "Ints"  # [items, options]
    damages: "Floats"  # the same; infinite where an item has fewer options, and where one before has the same cost
    order: "Ints"  # position of each option in its item


@dataclass(frozen=True, slots=True)
class _Relaxed:
    """The best choice for a price per bit, at the price where the budget is just kept."""

    columns: "Ints"  # [items], columns of the problem
    price: float  # damage that a bit is worth; 0 where bits are left over
    slack: int  # bits that the choice leaves of the budget, as far as any sum of costs can use them


@dataclass(frozen=True, slots=True)
class _Core:
    """Reduced costs: what an option costs more than the relaxed choice's, bits at their price included."""

    steps: "Ints"  # [items, options]: bits more than the relaxed choice
    harms: "Floats"  # damage more than it
    reduced: "Floats"  # harm and price of the step, as small as rounding may have left it; never below 0
    excess: float  # damage by which the relaxed choice is above the bound: what its slack is worth


def _read(items: Sequence[Item]) -> _Problem:
    import numpy as np

    width = max(len(i.options) for i in items)
    by_name = {id(i.options): i.options for i in items}  # many items share them
    orders = {key: _name_order(options, width) for key, options in by_name.items()}
    order = np.array([orders[id(i.options)] for i in items], np.int64)
    costs = np.array([i.bits + (_NO_OPTION,) * (width - len(i.bits)) for i in items], np.int64)
    damages = np.array([i.damages + (math.inf,) * (width - len(i.damages)) for i in items], np.float64)
    for keys in (damages, costs):  # stable, so that the last sort counts most
        sorting = np.argsort(np.take_along_axis(keys, order, axis=1), axis=1, kind="stable")
        order = np.take_along_axis(order, sorting, axis=1)
    costs, damages = np.take_along_axis(costs, order, axis=1), np.take_along_axis(damages, order, axis=1)
    damages[:, 1:][np.diff(costs, axis=1) == 0] = math.inf  # of options with equal bits the first is the best
    return _Problem(costs, damages, order)


def _name_order(options: Sequence[Option], width: int) -> tuple[int, ...]:
    return (*sorted(range(len(options)), key=lambda c: options[c].name), *range(len(options), width))


def _pick(values: "NDArray[Number]", columns: "Ints") -> "NDArray[Number]":
    """One value of each row."""
    import numpy as np

    return np.take_along_axis(values, columns[:, None], axis=1)[:, 0]


def _hull(problem: _Problem) -> tuple["Ints", "Floats"]:
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


def _relax(problem: _Problem, budget_bits: int) -> _Relaxed:
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
    return _Relaxed(_pick(corners, steps), price, room - (int(spent[taken - 1]) if taken else 0))


def _usable(problem: _Problem, room: int) -> int:
    """`room` rounded down to what steps between options can add up to: a multiple of their greatest common divisor."""
    import numpy as np

    steps = np.where(np.isfinite(problem.damages), problem.costs - problem.costs[:, :1], 0)
    unit = int(np.gcd.reduce(steps, axis=None))
    return room // unit * unit if unit else 0


def _reduce(problem: _Problem, relaxed: _Relaxed) -> _Core:
    import numpy as np

    has, at = np.isfinite(problem.damages), relaxed.columns[:, None]
    steps = np.where(has, problem.costs - np.take_along_axis(problem.costs, at, axis=1), 0)
    harms = np.where(has, problem.damages - np.take_along_axis(problem.damages, at, axis=1), 0.0)
    priced = relaxed.price * steps
    reduced = np.where(has, harms + priced - _ERROR * (np.abs(harms) + np.abs(priced)), math.inf)
    np.put_along_axis(reduced, at, 0.0, axis=1)
    below = np.minimum(reduced.min(axis=1), 0.0)
    excess = relaxed.price * relaxed.slack - math.fsum(below[below < 0].tolist())
    return _Core(steps, harms, np.maximum(reduced, 0.0), excess)


# --- the proof -------------------------------------------------------------------------------


@dataclass(slots=True)
class _Search:
    """The dynamic program's memory. A state is a choice for the items seen so far; others stay as in the relaxed
    choice. It is worth its reduced costs, and in the end what its slack is worth."""

    bits: "Ints"  # more than the relaxed choice, rising
    harms: "Ints"  # damage more than it, in units; falling
    best: float  # excess over the bound of the best choice found
    end: tuple[int, int, int] | None  # stage, state before it, and column of its item, of that choice
    lost: float  # least excess that a state which was not followed might have come to
    rows: list[int]  # item of each stage
    parents: "list[NDArray[np.int32]]"  # of each stage: state before it
    columns: "list[NDArray[np.int16]]"  # of each stage: what its item got


def _solve(problem: _Problem, budget_bits: int) -> tuple["Ints", float | None]:
    """The best choice and the bound on all damages; None where the choice meets it."""
    relaxed = _relax(problem, budget_bits)
    core = _reduce(problem, relaxed)
    start = math.fsum(_pick(problem.damages, relaxed.columns).tolist())
    least = start - core.excess
    if core.excess <= TOLERANCE * start:
        return relaxed.columns, None
    search = _search(core, relaxed)
    columns = relaxed.columns.copy()
    for row, column in _trace(search):
        columns[row] = column
    if search.lost >= search.best:
        return columns, None
    return columns, least + max(0.0, search.lost)


def _candidates(core: _Core, rows: "Ints", price: float, best: float) -> tuple["Ints", "Floats", "Floats"]:
    """Those of `rows` with an option that can be part of a better choice, those first that become best when the price
    changes least; and for each, the least reduced cost of a bit saved and of a bit spent by it or any behind it."""
    import numpy as np

    steps, reduced = core.steps[rows], core.reduced[rows]
    useful = (reduced < best) & (steps != 0)
    per_bit = np.where(useful, reduced / np.maximum(np.abs(steps), 1), math.inf)
    down = np.where(steps < 0, per_bit, math.inf).min(axis=1)
    up = np.minimum(np.where(steps > 0, per_bit, math.inf).min(axis=1), price)
    first = np.where(useful, per_bit, math.inf).min(axis=1)
    order = np.argsort(first, kind="stable")
    order = order[: int(np.isfinite(first).sum())]
    return rows[order], _least_behind(down[order]), _least_behind(up[order])


def _least_behind(values: "Floats") -> "Floats":
    import numpy as np

    least: Floats = np.minimum.accumulate(values[::-1])[::-1]
    return least


def _search(core: _Core, relaxed: _Relaxed) -> _Search:
    """Follow states item by item until none can lead to a better choice, or a limit is met."""
    import numpy as np

    price, slack = relaxed.price, relaxed.slack
    s = _Search(np.zeros(1, np.int64), np.zeros(1, np.int64), core.excess, None, math.inf, [], [], [])
    every = np.arange(len(core.steps), dtype=np.int64)
    rows, down, up = _candidates(core, every, price, s.best)
    scale = _scale(np.where(core.reduced < s.best, np.abs(core.harms), 0.0)[rows].max(axis=1, initial=0.0))
    filtered, at, stored = s.best, 0, 0
    while at < len(rows) and len(s.bits):
        row = int(rows[at])
        ahead = (float(down[at + 1]), float(up[at + 1])) if at + 1 < len(rows) else (math.inf, price)
        at += 1
        columns = np.flatnonzero((core.reduced[row] < s.best) & (core.steps[row] != 0))
        if not len(columns):
            continue
        if stored > MAX_STORED or len(s.rows) >= MAX_STAGES:
            s.lost = min(s.lost, float(_bounds(s.bits, s.harms, price, slack, scale, (0.0, 0.0)).min()))
            break
        _advance(s, core, row, [int(relaxed.columns[row]), *columns.tolist()], relaxed, scale, ahead)
        stored += len(s.bits)
        if s.best < filtered / 2:
            filtered = s.best
            rows, down, up = _candidates(core, rows[at:], price, s.best)
            at = 0
    return s


def _scale(largest: "Floats") -> int:
    """Damages times two to this power can be summed as integers, one of each of these at most."""
    total = math.fsum(largest.tolist())
    return _SUM_BITS - math.frexp(total)[1] if total > 0 else 0


def _bounds(bits: "Ints", harms: "Ints", price: float, slack: int, scale: int, ahead: tuple[float, float]) -> "Floats":
    """The least excess that states can come to, where items ahead save a bit and spend a bit for so much."""
    import numpy as np

    excess = np.ldexp(harms.astype(np.float64), -scale) + price * bits
    left = (slack - bits).astype(np.float64)
    over = left < 0
    need = np.where(over, -left * ahead[0] if math.isfinite(ahead[0]) else math.inf, left * ahead[1])
    least: Floats = excess + np.where(left == 0, 0.0, need)
    return least


def _advance(
    s: _Search, core: _Core, row: int, columns: list[int], relaxed: _Relaxed, scale: int, ahead: tuple[float, float]
) -> None:
    """One more item: every state with every column of it that may matter; the first is that of the relaxed choice."""
    import numpy as np

    price, slack, before = relaxed.price, relaxed.slack, len(s.bits)
    harm = np.rint(np.ldexp(core.harms[row, columns], scale)).astype(np.int64)
    bits = (s.bits + core.steps[row, columns][:, None]).ravel()
    harms = (s.harms + harm[:, None]).ravel()
    final = _bounds(bits, harms, price, slack, scale, (math.inf, price))
    found = int(np.argmin(final))
    if final[found] < s.best:
        s.best = float(final[found])
        s.end = (len(s.rows), found % before, columns[found // before])
    least = _bounds(bits, harms, price, slack, scale, ahead)
    alive = np.flatnonzero(least < s.best)
    alive = alive[np.lexsort((harms[alive], bits[alive]))]
    alive = alive[_undominated(harms[alive])]
    if len(alive) > MAX_STATES:
        ranked = np.argsort(least[alive], kind="stable")
        s.lost = min(s.lost, float(least[alive[ranked[MAX_STATES]]]))
        alive = alive[np.sort(ranked[:MAX_STATES])]
    s.rows.append(row)
    s.parents.append((alive % before).astype(np.int32))
    s.columns.append(np.array(columns, np.int16)[alive // before])
    s.bits, s.harms = bits[alive], harms[alive]


def _undominated(harms: "Ints") -> "Flags":
    """Of states in the order of bits, then harm: those with less harm than all before them."""
    import numpy as np

    first = np.ones(len(harms), np.bool_)
    first[1:] = harms[1:] < np.minimum.accumulate(harms)[:-1]
    return first


def _trace(s: _Search) -> list[tuple[int, int]]:
    """Item and column of every stage of the best choice."""
    if s.end is None:
        return []
    stage, state, column = s.end
    found = [(s.rows[stage], column)]
    for k in range(stage - 1, -1, -1):
        found.append((s.rows[k], int(s.columns[k][state])))
        state = int(s.parents[k][state])
    return found


# --- a floor ---------------------------------------------------------------------------------


def _fill(problem: _Problem, budget_bits: int, floor_bits: int) -> "Ints | None":
    """The choice of least damage that uses at least the floor and at most the budget; None where there is none, or
    where there are too many sums of bits."""
    import numpy as np

    has = np.isfinite(problem.damages)
    largest = np.where(has, problem.costs, 0).max(axis=1)
    least_ahead, most_ahead = int(problem.costs[:, 0].sum()), int(largest.sum())
    bits, damages = np.zeros(1, np.int64), np.zeros(1)
    stages: list[tuple[NDArray[np.int32], NDArray[np.int16]]] = []
    stored = 0
    for row in range(len(has)):
        least_ahead -= int(problem.costs[row, 0])
        most_ahead -= int(largest[row])
        columns = np.flatnonzero(has[row])
        sums = (bits + problem.costs[row, columns][:, None]).ravel()
        hurt = (damages + problem.damages[row, columns][:, None]).ravel()
        alive = np.flatnonzero((sums + least_ahead <= budget_bits) & (sums + most_ahead >= floor_bits))
        alive = alive[np.lexsort((hurt[alive], sums[alive]))]
        alive = alive[np.diff(sums[alive], prepend=-1) > 0]
        stored += len(alive)
        if not len(alive) or len(alive) > MAX_STATES * 10 or stored > MAX_STORED or row >= MAX_STAGES:
            return None
        stages.append(((alive % len(bits)).astype(np.int32), columns[alive // len(bits)].astype(np.int16)))
        bits, damages = sums[alive], hurt[alive]
    state, chosen = int(np.argmin(damages)), np.zeros(len(has), np.int64)
    for row in range(len(has) - 1, -1, -1):
        parents, picked = stages[row]
        chosen[row], state = picked[state], parents[state]
    return chosen
