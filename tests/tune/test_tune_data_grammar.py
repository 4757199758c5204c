"""Names of calibration data, and the random choices."""

import random

import numpy as np
import pytest

from shardq.errors import BadOption
from shardq.tune.data_grammar import SYSTEM_PROMPT, DataSet, parse_datasets
from shardq.tune.data_random import draw, draw_fractions, permuted, shuffled

PARSED = {
    "pile-10k": (DataSet("pile-10k"),),
    "a.json:num=12:concat": (DataSet("a.json", samples=12, concat=True),),
    "mbpp:split=train+test": (DataSet("mbpp", splits=("train", "test")),),
    "a.json:concat=false:apply_chat_template=True": (DataSet("a.json", chat=True),),
    "a.json:system_prompt=Be brief.": (DataSet("a.json", chat=True, system_prompt="Be brief."),),
    "a.json:apply_chat_template:system_prompt=": (DataSet("a.json", chat=True, system_prompt=""),),
    "x/y:num=3, ./b.jsonl , random:num=1": (DataSet("x/y", samples=3), DataSet("./b.jsonl"), DataSet("random", 1)),
}
REFUSED = {
    "": "name is missing",
    "a.json,": "name is missing",
    ":num=3": "name is missing",
    "a.json:number=3": "unknown option 'number=3'",
    "a.json:num=3:num=4": "twice",
    "a.json:num=0": "at least 1",
    "a.json:num": "at least 1",
    "a.json:num=-1": "at least 1",
    "a.json:num=1e3": "at least 1",
    "mbpp:split=": "split=NAME",
    "mbpp:split=train+": "split=NAME",
    "a.json:concat=yes": "concat=false",
    "a.json:system_prompt": "system_prompt=TEXT",
    "random:concat": "random",
    "self:split=train": "self",
}


@pytest.mark.parametrize("text", PARSED)
def test_sets_and_options_are_read(text: str) -> None:
    assert parse_datasets(text) == PARSED[text]


def test_a_system_prompt_does_not_leak_into_the_next_set() -> None:
    first, second = parse_datasets("a.json:system_prompt=Be brief.,b.json:apply_chat_template")
    assert (first.system_prompt, second.system_prompt) == ("Be brief.", SYSTEM_PROMPT)


@pytest.mark.parametrize("text", REFUSED)
def test_what_has_no_meaning_is_refused(text: str) -> None:
    with pytest.raises(BadOption, match=REFUSED[text]):
        parse_datasets(text)


@pytest.mark.parametrize("count", [0, 1, 2, 5, 1000])
@pytest.mark.parametrize("seed", [0, 42, 2**40])
def test_orders_are_those_of_the_generators_that_autoround_uses(count: int, seed: int) -> None:
    expected = list(range(count))
    random.Random(seed).shuffle(expected)
    assert shuffled(range(count), seed) == expected
    assert permuted(range(count), seed) == np.random.default_rng(seed).permutation(count).tolist()


def test_draws_are_pinned_and_uniform() -> None:
    assert draw(49135, 4, 42).tolist() == [38028, 21564, 42187, 34265]
    assert draw_fractions(2, 42).tolist() == np.random.default_rng(42).random(2).tolist()
    found = draw(10, 20_000, 7)
    assert set(found.tolist()) == set(range(10))
    assert np.bincount(found).std() < 3 * np.sqrt(20_000 * 0.1 * 0.9)


def test_the_callers_own_random_state_is_left_alone() -> None:
    random.seed(1)
    expected = random.random()
    random.seed(1)
    shuffled(range(100), 3)
    draw(10, 10, 3)
    assert random.random() == expected
