"""What a plan says that a run will need."""

from collections.abc import Callable
from typing import Any

import pytest

from shardq.needs import disk_bytes, record_bytes, shard_costs
from shardq.onepass import OnePass
from shardq.plans import make_plan
from shardq.recipe import make_recipe
from shardq.spans import cut_all
from shardq.traffic import count_requests

BF16 = "BF16"


@pytest.fixture
def work(make_checkpoint: Callable[..., Any]) -> OnePass:
    shards = {
        f"{name}.safetensors": {
            f"model.layers.{i}.mlp.up_proj.weight": (BF16, (rows, 256)),
            f"model.layers.{i}.input_layernorm.weight": (BF16, (256,)),
        }
        for i, (name, rows) in enumerate([("a", 64), ("b", 256), ("c", 128)])
    }
    return OnePass((make_plan(make_checkpoint(shards, {"num_hidden_layers": 3}), make_recipe("W4A16")),))


def test_costs_are_the_sizes_of_source_and_output(work: OnePass) -> None:
    sources = {s.name: s.size_bytes for s in work.checkpoint.shards}
    assert [(c.name, c.staged_bytes, c.output_bytes) for c in shard_costs(work, staged=True)] == [
        (f.name, sources[f.name], f.size_bytes) for f in work.plans[0].files
    ]
    assert {c.staged_bytes for c in shard_costs(work, staged=False)} == {0}


def test_each_way_needs_less_disk_than_the_one_before(work: OnePass) -> None:
    outputs = [f.size_bytes for f in work.plans[0].files]
    sources = [s.size_bytes for s in work.checkpoint.shards]
    records = record_bytes(work)
    assert disk_bytes(work, staged=True, uploads=False) == records + sum(outputs) + max(sources)
    assert disk_bytes(work, staged=False, uploads=False) == records + sum(outputs)
    assert disk_bytes(work, staged=True, uploads=True) == records + max(outputs) + max(sources)
    assert disk_bytes(work, staged=False, uploads=True) == records + max(outputs)


def test_requests_are_counted_by_shard_and_by_span(work: OnePass, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = count_requests(work, stream=False)
    assert whole.storage == 2 * len(work.plans[0].files)  # a header, a body
    monkeypatch.setattr("shardq.spans.SPAN_BYTES", 16 << 10)
    monkeypatch.setattr("shardq.cut.SPAN_BYTES", 16 << 10)
    monkeypatch.setattr("shardq.cut.SLAB_BYTES", 16 << 10)
    monkeypatch.setattr("shardq.cut.ROWS", 32)
    fine = OnePass((make_plan(work.checkpoint, work.plans[0].recipe),))
    spans = sum(map(len, cut_all(fine).values()))
    assert spans > 3 * len(work.plans[0].files)
    stream = count_requests(fine, stream=True)
    assert stream.storage == len(work.plans[0].files) + spans
    assert stream.hub == whole.hub  # the address of a shard is asked for once, however many spans it has
