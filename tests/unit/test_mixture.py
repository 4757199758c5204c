"""The choice of a scheme for each part of a model: the best there is, within the budget, and the same in any order."""

import itertools
import math
import os
import random
import subprocess
import sys
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

import shardq.mixture_proof
from shardq.errors import BadOption
from shardq.mixture import Item, Option
from shardq.mixture_choice import choose, find_budget, optimize

BF16 = "BF16"


def item(name: str, bits: Sequence[int], damages: Sequence[float], weights: int = 10) -> Item:
    return Item(name, "k", (name,), weights, tuple(Option(f"o{i}", None) for i in range(len(bits))), tuple(bits),
                tuple(damages))  # fmt: skip


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[Item], int]:
    """Few items of few options, many of them alike or dominated, and a budget that can be kept."""
    unit = draw(st.sampled_from([1, 8, 4096]))
    damage = draw(
        st.sampled_from(
            [st.integers(0, 4).map(float), st.floats(0, 1e3), st.floats(1e-300, 1e-290), st.floats(0, 1e30)]
        )
    )
    option = st.tuples(st.integers(0, 12).map(lambda n: n * unit), damage)
    items = [
        item(f"i{k}", *zip(*draw(st.lists(option, min_size=1, max_size=4)), strict=True))
        for k in range(draw(st.integers(1, 6)))
    ]
    least, largest = sum(min(i.bits) for i in items), sum(max(i.bits) for i in items)
    return items, draw(st.integers(least, largest + 2))


def least_damage(items: Sequence[Item], budget: int, floor: int = 0) -> float | None:
    sums = (
        (sum(i.bits[c] for i, c in zip(items, cs, strict=True)), [i.damages[c] for i, c in zip(items, cs, strict=True)])
        for cs in itertools.product(*(range(len(i.options)) for i in items))
    )
    return min((math.fsum(damages) for bits, damages in sums if floor <= bits <= budget), default=None)


def same(a: float, b: float | None) -> bool:
    return b is not None and math.isclose(a, b, rel_tol=1e-12)


# --- the best choice -------------------------------------------------------------------------


@given(problems())
def test_no_choice_is_better(problem: tuple[list[Item], int]) -> None:
    items, budget = problem
    found = optimize(items, budget)
    assert same(found.damage, least_damage(items, budget))
    assert found.is_proven
    assert found.bits <= budget
    assert found.weights == 10 * len(items)
    own = {i.name: dict(zip(i.options, zip(i.bits, i.damages, strict=True), strict=True)) for i in items}
    assert found.bits == sum(own[n][o][0] for n, o in found.choice.items())
    assert found.damage == math.fsum(own[n][o][1] for n, o in found.choice.items())


@given(problems(), st.randoms(use_true_random=False))
def test_neither_the_order_of_items_nor_of_options_matters(problem: tuple[list[Item], int], r: random.Random) -> None:
    items, budget = problem
    turned = []
    for i in items:
        order = list(range(len(i.options)))
        r.shuffle(order)
        o, b, d = (tuple(v[k] for k in order) for v in (i.options, i.bits, i.damages))
        turned.append(Item(i.name, i.kind, i.modules, i.weights, o, b, d))  # type: ignore[arg-type]
    r.shuffle(turned)
    one, other = optimize(items, budget), optimize(turned, budget)
    assert one == other
    assert list(one.choice) == list(other.choice) == sorted(one.choice)


@given(problems(), st.integers(0, 40))
def test_a_floor_is_kept_where_some_choice_keeps_it(problem: tuple[list[Item], int], below: int) -> None:
    items, budget = problem
    floor = max(0, budget - below)
    found = optimize(items, budget, floor)
    wanted = least_damage(items, budget, floor)
    assert found.bits >= floor or wanted is None
    assert same(found.damage, least_damage(items, budget) if wanted is None else wanted)
    assert found.bound <= found.damage


@given(problems())
def test_where_work_ends_early_the_bound_still_holds(problem: tuple[list[Item], int]) -> None:
    items, budget = problem
    best = least_damage(items, budget)
    assert best is not None
    with pytest.MonkeyPatch.context() as m:
        m.setattr(shardq.mixture_proof, "MAX_STATES", 1)
        m.setattr(shardq.mixture_proof, "MAX_STAGES", 2)
        found = optimize(items, budget)
    assert found.bits <= budget
    assert found.bound <= best * (1 + 1e-12) <= found.damage * (1 + 2e-12)
    assert not found.is_proven or same(found.damage, best)


def by_sums(items: Sequence[Item], budget: int) -> float:
    """Another way to the same: a table of all sums of bits, with whole damages."""
    table = {0: 0.0}
    for i in items:
        wider: dict[int, float] = {}
        for (bits, damage), (b, d) in itertools.product(table.items(), zip(i.bits, i.damages, strict=True)):
            if bits + b <= budget and damage + d < wider.get(bits + b, math.inf):
                wider[bits + b] = damage + d
        table = wider
    return min(table.values())


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("kind", ["free", "falling", "correlated"])
def test_larger_problems_agree_with_a_table_of_all_sums(seed: int, kind: str) -> None:
    r = random.Random(seed)
    items = []
    for k in range(60):
        bits = sorted(r.randrange(1, 300) for _ in range(4))
        damages = {
            "free": [r.randrange(10**9) for _ in bits],
            "falling": sorted((r.randrange(10**9) for _ in bits), reverse=True),
            "correlated": [10**4 - 10 * b + r.randrange(8) for b in bits],
        }[kind]
        items.append(item(f"i{k}", bits, [float(d) for d in damages]))
    least, largest = sum(min(i.bits) for i in items), sum(max(i.bits) for i in items)
    budget = r.randrange(least, largest)
    found = optimize(items, budget)
    assert found.damage == by_sums(items, budget)
    assert found.is_proven


def model(count: int, seed: int = 0) -> list[Item]:
    """Items of a few sizes, as layers have them, under 2, 4 and 8 bits."""
    r = random.Random(seed)
    items = []
    for k in range(count):
        weights = r.choice([2**20, 3 * 2**20, 2**22, 2**24])
        scale = weights * math.exp(r.gauss(0, 1.5))
        items.append(item(f"l{k}", [int(weights * b) for b in (2.25, 4.125, 8.125)],
                          [scale * 4.0**-b for b in (2, 4, 8)], weights))  # fmt: skip
    return items


@pytest.mark.parametrize("target", [2.5, 3.0, 4.5, 6.0, 8.0])
def test_a_model_uses_its_budget_to_half_a_percent(target: float) -> None:
    found = choose(model(160), target)
    assert 0.995 * target <= found.average_bits <= target
    assert found.is_proven


def test_twenty_thousand_items_are_proven() -> None:
    found = choose(model(20_000), 4.5)
    assert found.is_proven
    assert 4.4999 < found.average_bits <= 4.5


def test_more_budget_never_harms() -> None:
    items = model(40)
    damages = [optimize(items, find_budget(items, t / 8)).damage for t in range(20, 64)]
    assert damages == sorted(damages, reverse=True)


def test_among_equals_the_first_names_get_the_bits() -> None:
    items = [item(n, (10, 20), (1.0, 0.5)) for n in "dbca"]
    found = optimize(items, 60)
    assert [n for n, o in found.choice.items() if o.name == "o1"] == ["a", "b"]


def test_fixed_items_count_and_stay() -> None:
    items = [item("fixed", (100,), (0.0,)), item("free", (10, 20), (1.0, 0.5))]
    assert optimize(items, 119).choice["free"].name == "o0"
    assert optimize(items, 120).choice["free"].name == "o1"
    assert optimize(items[:1], 100).bits == 100
    assert optimize([], 0).choice == {}


# --- what is refused -------------------------------------------------------------------------


def test_a_budget_below_the_least_names_what_is_possible() -> None:
    items = [item("a", (25, 80), (1.0, 0.0)), item("b", (20, 81), (1.0, 0.0))]
    with pytest.raises(BadOption, match=r"44 bits \(2\.2000 for each weight\).*from 2\.2500 to 8\.0500"):
        optimize(items, 44)
    assert optimize(items, 45).bits == 45


@pytest.mark.parametrize("target", [2.2, 8.2, math.nan, math.inf, -1.0])
def test_a_target_that_cannot_be_met_names_what_can(target: float) -> None:
    items = [item("a", (25, 80), (1.0, 0.0)), item("b", (20, 81), (1.0, 0.0))]
    with pytest.raises(BadOption, match=r"from 2\.2500 to 8\.0500"):
        find_budget(items, target)


def test_budgets_are_rounded_down() -> None:
    assert find_budget([item("a", (40, 60), (1.0, 0.0), weights=11)], 4.3) == 47
    with pytest.raises(BadOption, match="nothing to choose"):
        find_budget([], 4.5)


@pytest.mark.parametrize("bad", [((1,), (math.nan,)), ((1,), (math.inf,)), ((1,), (-1.0,)), ((-1,), (0.0,)), ((), ())])
def test_values_that_cannot_be_weighed_are_refused(bad: tuple[tuple[int, ...], tuple[float, ...]]) -> None:
    with pytest.raises(BadOption, match="broken"):
        item("broken", *bad)
    with pytest.raises(BadOption, match="two items are called a"):
        optimize([item("a", (1,), (0.0,))] * 2, 10)


# --- every machine, every run ----------------------------------------------------------------

SCRIPT = """
import sys
import shardq.mixture_choice, shardq.mixture_file
assert "numpy" not in sys.modules
from shardq.mixture import Item, Option
from shardq.mixture_choice import choose
items = [Item(f"m.{k}.w", "w", (f"m.{k}.w",), 10, tuple(Option(f"o{i}", None) for i in range(3)), (20, 40, 80),
              (9.0 * (1 + k % 5), 3.0, 1.0)) for k in {*range(50)}]
print(shardq.mixture_file.layer_config_text(items, choose(items, 4.5)))
"""


def test_hash_seeds_do_not_matter_and_planning_needs_no_numpy() -> None:
    texts = {
        subprocess.run([sys.executable, "-P", "-c", SCRIPT], env={**os.environ, "PYTHONHASHSEED": seed}, check=True,
                       capture_output=True, text=True).stdout for seed in ("1", "2")
    }  # fmt: skip
    assert len(texts) == 1
    assert "# Mixed precision" in texts.pop()
