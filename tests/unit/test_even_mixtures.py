"""One scheme for all, where a mixture promises hardly less damage."""

from dataclasses import replace

import pytest

from shardq.even import prefer_even
from shardq.mixture import Item, Mixture, Option
from shardq.mixture_choice import choose

TWO, THREE, FOUR = (Option(f"W{bits}", None) for bits in (2, 3, 4))


def items(saved: float, weights: int = 1000) -> list[Item]:
    """At 3 bits all have a damage of 10; one at 4 bits and another at 2 save a share of it."""
    hurt = [(9.0, 2.0, 1.5 - 10 * saved), (1.5, 1.0, 0.9), *[(9.0, 1.0, 0.9)] * 7]
    free = [
        Item(f"i{k}", "k", (f"i{k}",), weights, (TWO, THREE, FOUR), (2 * weights, 3 * weights, 4 * weights), damages)
        for k, damages in enumerate(hurt)
    ]
    return [*free, Item("fixed", "k", ("fixed",), 10, (FOUR,), (40,), (0.0,))]


def chosen(found: Mixture) -> set[str]:
    return {o.name for name, o in found.choice.items() if name != "fixed"}


@pytest.mark.parametrize("saved", [-0.04, 0.0, 0.04, 0.049])
def test_little_is_not_worth_a_bet(saved: float) -> None:
    of = items(saved)
    mixture = choose(of, 3.002)
    found = prefer_even(of, mixture)
    assert chosen(found) == {"W3"}
    assert (found.bits, found.damage, found.bound) == (27040, 10.0, min(10.0, mixture.bound))
    assert found.choice["fixed"] is FOUR
    assert found.is_proven is (mixture.damage == 10.0)


def test_much_is() -> None:
    of = items(0.051)
    mixture = choose(of, 3.002)
    assert prefer_even(of, mixture) is mixture
    assert chosen(mixture) == {"W2", "W3", "W4"}
    assert mixture.damage == pytest.approx(9.49)


@pytest.mark.parametrize(("saved", "even"), [(0.04, True), (0.051, False)])
def test_a_promise_is_made_in_damage_whatever_has_chosen(saved: float, even: bool) -> None:
    promised = items(saved)
    of = [replace(i, damages=tuple(d**1.5 for d in i.damages)) for i in items(0.1)]
    mixture = choose(of, 3.002)
    assert prefer_even(of, mixture) is mixture
    found = prefer_even(of, mixture, promised)
    assert (chosen(found) == {"W3"}) is even
    assert (found is mixture) is not even


def test_one_scheme_of_another_size_is_no_choice() -> None:
    of = items(0.04)
    for target in (3.1, 2.95):
        mixture = choose(of, target)
        assert prefer_even(of, mixture) is mixture


def test_an_option_that_some_lack_is_no_choice() -> None:
    of = items(0.04)
    last = Item("i9", "k", ("i9",), 1000, (TWO, FOUR), (2000, 4000), (9.0, 0.9))
    of = [i for i in of if i.name != "i9"] + [last]
    mixture = choose(of, 3.1)
    assert prefer_even(of, mixture) is mixture
    assert prefer_even([], Mixture({}, 0, 0, 0, 0.0, 0.0)).choice == {}
