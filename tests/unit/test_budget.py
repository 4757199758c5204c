"""ByteBudget: what is admitted, and that the books balance."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardq.budget import ByteBudget


def test_admits_up_to_the_cap() -> None:
    budget = ByteBudget(10)
    budget.take(7)
    assert budget.admits(3)
    assert not budget.admits(4)
    budget.give(7)
    assert (budget.used_bytes, budget.peak_bytes, budget.limit_bytes) == (0, 7, 10)


def test_giant_is_admitted_alone_only() -> None:
    budget = ByteBudget(10)
    budget.take(1)
    assert not budget.admits(11)
    budget.give(1)
    budget.take(11)
    assert not budget.admits(0)


def test_no_cap_admits_everything() -> None:
    budget = ByteBudget(None)
    budget.take(1 << 60)
    assert budget.admits(1 << 60)


@pytest.mark.parametrize("cost_bytes", [-1, 6])
def test_take_refuses_what_is_not_admitted(cost_bytes: int) -> None:
    budget = ByteBudget(10)
    budget.take(5)
    with pytest.raises(ValueError, match="cannot take"):
        budget.take(cost_bytes)
    assert budget.used_bytes == 5


@pytest.mark.parametrize("cost_bytes", [-1, 6])
def test_give_refuses_more_than_was_taken(cost_bytes: int) -> None:
    budget = ByteBudget(10)
    budget.take(5)
    with pytest.raises(ValueError, match="cannot give back"):
        budget.give(cost_bytes)
    assert budget.used_bytes == 5


def test_negative_cap_is_refused() -> None:
    with pytest.raises(ValueError, match="0 or more"):
        ByteBudget(-1)


@given(st.integers(0, 100), st.lists(st.tuples(st.integers(0, 150), st.booleans())))
def test_peak_is_the_cap_or_one_giant(limit_bytes: int, steps: list[tuple[int, bool]]) -> None:
    budget = ByteBudget(limit_bytes)
    held: list[int] = []
    for cost_bytes, give_first in steps:
        if give_first and held:
            budget.give(held.pop(0))
        if budget.admits(cost_bytes):
            budget.take(cost_bytes)
            held.append(cost_bytes)
        assert budget.used_bytes == sum(held)
        assert sum(held) <= limit_bytes or [c for c in held if c] == [sum(held)]
