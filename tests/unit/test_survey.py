"""What waits for a largest magnitude, and what is believed of one."""

from collections.abc import Callable
from typing import Any

import pytest

from shardq.needs import shard_costs
from shardq.onepass import OnePass
from shardq.plans import make_plan
from shardq.recipe import make_recipe
from shardq.survey import Survey
from shardq.tasks import Bundle, QuantizeTask, Streamed, Surveyed

ATTENTION = "model.layers.0.self_attn"
Q, K, V = (f"{ATTENTION}.{p}_proj.weight" for p in "qkv")
MATRIX = ("BF16", (256, 128))
CONFIG = {"num_hidden_layers": 1, "model_type": "llama"}


@pytest.fixture
def work(make_checkpoint: Callable[..., Any]) -> OnePass:
    """q in one shard, k in the next, v in the last; the first output needs no magnitude."""
    shards = {
        "a.safetensors": {Q: MATRIX, f"{ATTENTION}.o_proj.weight": MATRIX},
        "b.safetensors": {K: MATRIX},
        "c.safetensors": {V: MATRIX},
    }
    checkpoint = make_checkpoint(shards, CONFIG)
    return OnePass(tuple(make_plan(checkpoint, make_recipe(s)) for s in ("W4A16", "NVFP4A16")))


def streamed(work: OnePass, name: str) -> Streamed:
    return Streamed(next(b for b in work.bundles if b.tensor == name), "memory", 0)


def measured(work: OnePass, name: str, amax: float) -> Surveyed:
    return Surveyed(name, work.checkpoint.tensors[name].begin, amax)


def amaxes(ready: list[Any]) -> list[tuple[str, list[float | None], str]]:
    found = []
    for each in ready:
        bundle = each.work if isinstance(each, Streamed) else each
        assert isinstance(bundle, Bundle)
        tasks = [m.task for m in bundle.members if isinstance(m.task, QuantizeTask)]
        found.append((bundle.tensor, [t.amax for t in tasks], tasks[-1].amax_of))
    return found


def test_group_gets_the_largest_of_its_members_and_others_nothing(work: OnePass) -> None:
    survey = Survey(work, {})
    for name in (Q, K, V):
        survey.wait(streamed(work, name))
    survey.take(measured(work, Q, 1.0))
    survey.take(measured(work, K, 3.0))
    assert survey.ready() == []
    assert survey.take(measured(work, V, 2.0)) == 2.0
    assert amaxes(survey.ready()) == [(n, [None, 3.0], K) for n in (Q, K, V)]
    assert survey.contradicted("b.safetensors") == []


def test_own_bytes_are_measured_also_when_the_value_is_known_from_ahead(work: OnePass) -> None:
    survey = Survey(work, {})
    for name, amax in ((Q, 1.0), (K, 2.0), (V, 1.5)):
        assert survey.ask_ahead(name)
        assert not survey.ask_ahead(name)
        survey.take_ahead(name, amax)
    survey.wait(streamed(work, K))
    assert survey.ready() == []
    survey.take(measured(work, K, 4.0))
    assert amaxes(survey.ready()) == [(K, [None, 2.0], K)]
    assert survey.contradicted("b.safetensors") == [K]


def test_what_is_verified_needs_no_measuring(work: OnePass) -> None:
    survey = Survey(work, {Q: 1.0, K: 2.0, V: 1.5})
    assert survey.tasks([Q, K, V]) == []
    survey.wait(streamed(work, V))
    assert amaxes(survey.ready()) == [(V, [None, 2.0], K)]


def test_wrong_shard_takes_back_what_others_count_on(work: OnePass) -> None:
    survey = Survey(work, {})
    assert [t.tensor for t in survey.tasks([Q])] == [Q]
    survey.take(measured(work, Q, 9.0))
    assert survey.expects(Q)
    survey.wait(streamed(work, K))
    survey.take(measured(work, K, 2.0))
    assert survey.forget("a.safetensors") == [Q]
    assert not survey.expects(Q)
    survey.take(measured(work, V, 1.0))
    assert survey.ready() == []
    survey.take_ahead(Q, 3.0)
    assert amaxes(survey.ready()) == [(K, [None, 3.0], Q)]
    assert [t.tensor for t in survey.tasks([Q])] == [Q]  # of the bytes that come again


def test_a_shard_waits_for_those_that_its_files_need(work: OnePass) -> None:
    files = [{f.name: f.shards for f in p.files} for p in work.plans]
    names = [s.name for s in work.checkpoint.shards]
    assert files[0] == {n: (n,) for n in names}
    assert files[1] == {n: (n, *(m for m in names if m != n)) for n in names}
    assert [c.hold for c in shard_costs(work, staged=True)] == [2, 1, 0]
    assert [c.hold for c in shard_costs(OnePass(work.plans[:1]), staged=True)] == [0, 0, 0]
    sealed = [set(names), {"c.safetensors"}]  # the others still need its magnitude
    assert [(c.name, c.output_bytes > 0) for c in shard_costs(work, True, sealed)] == list(
        zip(names, (True, True, False), strict=True)
    )
