"""In which order work begins, and what waits."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from shardq.backlog import Backlog
from shardq.onepass import OnePass
from shardq.plans import make_plan
from shardq.recipe import make_recipe
from shardq.spans import Span
from shardq.streamer import Piece
from shardq.survey import Survey
from shardq.tasks import Bundle, SettleTask, Streamed, Surveyed, SurveyTask

A, B = "a.safetensors", "b.safetensors"
Q, K, OUT = (f"model.layers.0.self_attn.{p}_proj.weight" for p in "qko")
CONFIG = {"num_hidden_layers": 1, "model_type": "llama"}
FP8 = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}, "num_hidden_layers": 1}


class FakeSupply:
    """Says what is at hand, and keeps what is asked for."""

    def __init__(self, *at_hand: str) -> None:
        self.at_hand, self.ahead = set(at_hand), list[str]()

    def is_at_hand(self, shard: str) -> bool:
        return shard in self.at_hand

    def read_ahead(self, tensor: str) -> None:
        self.ahead.append(tensor)


@pytest.fixture
def work(make_checkpoint: Callable[..., Any]) -> OnePass:
    """q in one shard and k in another, which share a scale."""
    checkpoint = make_checkpoint({A: {Q: ("BF16", (64, 64))}, B: {K: ("BF16", (64, 64))}}, CONFIG)
    return OnePass((make_plan(checkpoint, make_recipe("NVFP4A16")),))


def backlog_of(work: OnePass, supply: Any) -> Backlog:
    bundles = {name: [b for b in work.bundles if b.shard == name] for name in (A, B)}
    return Backlog(work, bundles, Survey(work, {}), supply)


def drain(backlog: Backlog) -> list[tuple[type[Any], str]]:
    """What there is to do, in order: of which kind, on which tensor."""
    found = []
    while not backlog.is_empty:
        work = backlog.pop()
        what: Any = work.work if isinstance(work, Streamed) else work
        found.append((type(what), what.shard if isinstance(what, SettleTask) else what.tensor))
    return found


def surveyed(work: OnePass, tensor: str) -> Surveyed:
    return Surveyed(tensor, work.tensors[tensor].begin, 1.0)


def test_what_needs_a_magnitude_waits_and_then_comes_before_the_rest(work: OnePass) -> None:
    supply = FakeSupply(A)
    backlog = backlog_of(work, supply)
    assert backlog.take_shard(A) == [A]
    assert drain(backlog) == [(SurveyTask, Q)]
    assert backlog.take_surveyed(surveyed(work, Q)) == 1.0
    assert backlog.is_empty  # k is not measured
    supply.at_hand.add(B)
    assert backlog.take_shard(B) == [B]
    assert drain(backlog) == [(SurveyTask, K)]
    settle = SettleTask(0, A, ())
    backlog.put_first(settle)
    backlog.take_surveyed(surveyed(work, K))
    assert drain(backlog) == [(Bundle, Q), (Bundle, K), (SettleTask, A)]
    assert supply.ahead == []


def test_piece_has_what_it_needs_from_elsewhere_read_ahead_once(work: OnePass) -> None:
    supply = FakeSupply()
    backlog = backlog_of(work, supply)
    bundles = tuple(b for b in work.bundles if b.shard == A)
    slot: Any = SimpleNamespace(path="memory")
    piece = Piece(Span(A, 0, work.checkpoint.shards[0].size_bytes, bundles), slot, 0)
    backlog.take_piece(piece)
    assert supply.ahead == [K]
    assert drain(backlog) == [(SurveyTask, Q)]
    backlog.take_ahead(K, 2.0)
    assert backlog.is_empty  # its own bytes are not measured
    backlog.take_surveyed(surveyed(work, Q))
    assert drain(backlog) == [(Bundle, Q)]
    backlog.forget(A)
    backlog.take_piece(piece)
    assert supply.ahead == [K]
    assert drain(backlog) == [(SurveyTask, Q)]


def test_shard_waits_until_its_companions_are_at_hand(make_checkpoint: Callable[..., Any]) -> None:
    shards = {
        A: {Q: ("F8_E4M3", (256, 256))},
        B: {f"{Q}_scale_inv": ("F32", (2, 2)), OUT: ("BF16", (256, 256))},
    }
    work = OnePass((make_plan(make_checkpoint(shards, FP8), make_recipe("W4A16")),))
    supply = FakeSupply(A)
    backlog = backlog_of(work, supply)
    assert backlog.take_shard(A) == []
    assert backlog.is_empty
    supply.at_hand.add(B)
    assert backlog.take_shard(B) == [A, B]
    assert drain(backlog) == [(Bundle, Q), (Bundle, OUT)]
