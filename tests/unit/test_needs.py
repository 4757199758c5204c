"""What a plan says that a run will need."""

from collections.abc import Callable
from typing import Any

import pytest

from shardq.needs import count_requests, disk_bytes, record_bytes, shard_costs
from shardq.plans import Plan, make_plan
from shardq.recipe import make_recipe
from shardq.spans import cut_spans

BF16 = "BF16"


@pytest.fixture
def plan(make_checkpoint: Callable[..., Any]) -> Plan:
    shards = {
        f"{name}.safetensors": {
            f"model.layers.{i}.mlp.up_proj.weight": (BF16, (rows, 256)),
            f"model.layers.{i}.input_layernorm.weight": (BF16, (256,)),
        }
        for i, (name, rows) in enumerate([("a", 64), ("b", 256), ("c", 128)])
    }
    return make_plan(make_checkpoint(shards, {"num_hidden_layers": 3}), make_recipe("W4A16"))


def test_costs_are_the_sizes_of_source_and_output(plan: Plan) -> None:
    sources = {s.name: s.size_bytes for s in plan.checkpoint.shards}
    assert [(c.name, c.staged_bytes, c.output_bytes) for c in shard_costs(plan, staged=True)] == [
        (f.shard, sources[f.shard], f.size_bytes) for f in plan.files
    ]
    assert {c.staged_bytes for c in shard_costs(plan, staged=False)} == {0}


def test_each_way_needs_less_disk_than_the_one_before(plan: Plan) -> None:
    outputs = [f.size_bytes for f in plan.files]
    sources = [s.size_bytes for s in plan.checkpoint.shards]
    records = record_bytes(plan)
    assert disk_bytes(plan, staged=True, uploads=False) == records + sum(outputs) + max(sources)
    assert disk_bytes(plan, staged=False, uploads=False) == records + sum(outputs)
    assert disk_bytes(plan, staged=True, uploads=True) == records + max(outputs) + max(sources)
    assert disk_bytes(plan, staged=False, uploads=True) == records + max(outputs)


def test_requests_are_counted_by_shard_and_by_span(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = count_requests(plan, stream=False)
    assert whole.storage == 2 * len(plan.files)  # a header, a body
    monkeypatch.setattr("shardq.spans.SPAN_BYTES", 16 << 10)
    monkeypatch.setattr("shardq.plans.SPAN_BYTES", 16 << 10)
    monkeypatch.setattr("shardq.plans.SLAB_BYTES", 16 << 10)
    fine = make_plan(plan.checkpoint, plan.recipe)
    spans = sum(
        len(cut_spans(s.name, s.size_bytes, [t for t in fine.tasks if t.shard == s.name]))
        for s in fine.checkpoint.shards
    )
    assert spans > 3 * len(plan.files)
    stream = count_requests(fine, stream=True)
    assert stream.storage == len(plan.files) + spans
    assert stream.hub == whole.hub  # the address of a shard is asked for once, however many spans it has
