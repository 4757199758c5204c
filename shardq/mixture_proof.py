"""The best mixture there is, or how much better another one may be: a dynamic program over the items whose options can
still matter closes the gap between the relaxed choice and its bound (Pisinger, "A minimal algorithm for the
multiple-choice knapsack problem", European Journal of Operational Research 83, 1995: an expanding core, states without
those that others dominate, and bounds from the slopes of what is left)."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from shardq.mixture import TOLERANCE
from shardq.mixture_relaxed import Core, Problem, Relaxed, pick, reduce_costs, relax

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from shardq.mixture_relaxed import Floats, Ints

    Flags = NDArray[np.bool_]

MAX_STATES: Final = 50_000  # partial choices that are followed at a time
MAX_STORED: Final = 20_000_000  # partial choices that are remembered, six bytes each
MAX_STAGES: Final = 20_000  # items that the dynamic program looks at
SUM_BITS: Final = 61  # damages are summed as integers of so many bits


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


def solve(problem: Problem, budget_bits: int) -> tuple["Ints", float | None]:
    """The best choice and the bound on all damages; None where the choice meets it."""
    relaxed = relax(problem, budget_bits)
    core = reduce_costs(problem, relaxed)
    start = math.fsum(pick(problem.damages, relaxed.columns).tolist())
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


def _candidates(core: Core, rows: "Ints", price: float, best: float) -> tuple["Ints", "Floats", "Floats"]:
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


def _search(core: Core, relaxed: Relaxed) -> _Search:
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
    return SUM_BITS - math.frexp(total)[1] if total > 0 else 0


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
    s: _Search, core: Core, row: int, columns: list[int], relaxed: Relaxed, scale: int, ahead: tuple[float, float]
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
