"""Which scheme each part of a model gets, for the least damage within a budget of bits: the multiple-choice knapsack.

`optimize` finds the choice of least damage whose bits stay within the budget, and proves it: mixture_relaxed.py gives a
first choice and a bound, mixture_proof.py closes the gap between the two. Where some least of bits is asked for as
well, a table of all sums of bits fills up to that.

Pure: the result depends on the values of the items alone, not on their order, on hashes or on time.
"""

import math
from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise
from typing import TYPE_CHECKING

from shardq.errors import BadOption
from shardq.mixture import WINDOW, Item, Mixture
from shardq.mixture_proof import MAX_STAGES, MAX_STATES, MAX_STORED, solve
from shardq.mixture_relaxed import Problem, pick, read_items

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from shardq.mixture_relaxed import Ints


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
    problem = read_items(ordered)
    if budget_bits < int(problem.costs[:, 0].sum()):
        weights = sum(i.weights for i in items)
        least, largest = _averages(items)
        raise BadOption(
            f"a budget of {budget_bits} bits ({budget_bits / max(1, weights):.4f} for each weight) is too small: the "
            f"options allow averages from {least:.4f} to {largest:.4f} bits"
        )
    columns, bound = solve(problem, budget_bits)
    bits = pick(problem.costs, columns).sum()
    if bits < floor_bits and (filled := _fill(problem, budget_bits, floor_bits)) is not None:
        columns = filled
    originals = pick(problem.order, columns).tolist()
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


def _fill(problem: Problem, budget_bits: int, floor_bits: int) -> "Ints | None":
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
