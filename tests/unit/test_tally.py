"""What a run tells of how far it is."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from shardq.onepass import OnePass
from shardq.plans import make_plan
from shardq.progress import Progress
from shardq.recipe import make_recipe
from shardq.tally import Tally


def test_bytes_are_counted_until_they_are_taken_back(make_checkpoint: Callable[..., Any]) -> None:
    names = [f"model.layers.0.self_attn.{p}_proj.weight" for p in "qkvo"]
    checkpoint = make_checkpoint({"a.safetensors": dict.fromkeys(names, ("BF16", (64, 64)))}, {"model_type": "llama"})
    work = OnePass((make_plan(checkpoint, make_recipe("W4A16G64")),))
    each = 64 * 64 * 2
    assert [b.source_bytes for b in work.bundles] == [each] * 4
    lane: Any = SimpleNamespace(
        files=dict.fromkeys("abc"), sealed=dict.fromkeys("a"), uploader=SimpleNamespace(moved_bytes=5)
    )
    supply: Any = SimpleNamespace(fetched_bytes=7)
    told: list[Progress] = []
    tally = Tally(work, work.bundles[1:], [lane, lane], supply, told.append)
    assert tally.percent == 25
    tally.add(work.bundles[1], is_reused=True)
    tally.add(work.bundles[2], is_reused=False)
    assert tally.percent == 75
    tally.tell("work", "a.safetensors")
    tally.take_back(work.bundles[2])
    tally.tell("file", "b")
    assert told == [
        Progress("work", "a.safetensors", 3 * each, 4 * each, 2 * each, 7, 2, 6, 10),
        Progress("file", "b", 2 * each, 4 * each, 2 * each, 7, 2, 6, 10),
    ]
