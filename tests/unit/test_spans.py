"""Spans tile a shard, and every task lies in exactly one."""

import itertools
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardq.checkpoint import Checkpoint, Shard, TensorRef
from shardq.files.safetensors import TensorSpec, plan_file
from shardq.onepass import BOND_BYTES, OnePass
from shardq.plans import Plan, make_plan
from shardq.recipe import make_recipe
from shardq.spans import Span, cut_all, cut_spans, keep_bundles, largest_span_bytes
from shardq.tasks import SPAN_BYTES, Bundle, CopyTask, Member, Piece

SHARD = "model.safetensors"
CONFIG = {"num_hidden_layers": 1, "vocab_size": 64}


def copy(number: int, begin: int, size_bytes: int, bond: str = "") -> Bundle:
    task = CopyTask(number, SHARD, SHARD, (Piece(f"t{number}", begin, begin, size_bytes),))
    return Bundle(number, (Member(0, task),), bond)


def check_tiling(spans: tuple[Span, ...], size_bytes: int) -> None:
    """From the first byte to the last, without gap or overlap, no piece empty."""
    at = 0
    for span in spans:
        assert span.begin == at
        assert span.size_bytes > 0
        at = span.end
    assert at == size_bytes


def check_homes(spans: tuple[Span, ...], tasks: list[Any]) -> None:
    """Every task is in one span and reads nothing outside it."""
    assert sorted(t.id for s in spans for t in s.bundles) == sorted(t.id for t in tasks)
    for span in spans:
        for task in span.bundles:
            begin, end = task.extent
            assert span.begin <= begin < end <= span.end


@given(
    st.lists(st.tuples(st.integers(0, 40), st.integers(1, 90)), max_size=30), st.integers(0, 200), st.integers(1, 60)
)
def test_any_tasks_in_a_row(gaps_and_sizes: list[tuple[int, int]], tail: int, span_bytes: int) -> None:
    tasks, at = [], 0
    for number, (gap, size_bytes) in enumerate(gaps_and_sizes):
        tasks.append(copy(number, at + gap, size_bytes))
        at += gap + size_bytes
    with patch("shardq.spans.SPAN_BYTES", span_bytes):
        spans = cut_spans(SHARD, at + tail, tasks[::-1])
    check_tiling(spans, at + tail)
    check_homes(spans, tasks)
    for span in spans:
        assert span.size_bytes <= span_bytes or len(span.bundles) == 1
    for one, two in itertools.pairwise(spans):  # as few as possible: neighbours would not fit together
        if one.bundles and two.bundles:
            assert two.bundles[0].extent[1] - one.begin > span_bytes


@given(
    st.lists(st.tuples(st.sampled_from(["up_proj", "norm"]), st.integers(0, 12)), min_size=1, max_size=25),
    st.integers(2048, 9000),
)
def test_any_plan(modules: list[tuple[str, int]], span_bytes: int) -> None:
    """Copies share tasks that reach over quantized tensors between them; a span still holds whole tasks."""
    with patch("shardq.spans.SPAN_BYTES", span_bytes), patch("shardq.cut.SPAN_BYTES", span_bytes):
        work = OnePass((plan_of(modules),))
        tasks = list(work.bundles)
        size_bytes = work.checkpoint.shards[0].size_bytes
        spans = cut_all(work)[SHARD]
        slot_bytes = largest_span_bytes(work)
    check_tiling(spans, size_bytes)
    check_homes(spans, tasks)
    for span in spans:
        assert span.size_bytes <= max([span_bytes, *(b - a for a, b in (t.extent for t in span.bundles))])
        assert span.size_bytes <= slot_bytes


def plan_of(modules: list[tuple[str, int]]) -> Plan:
    """A plan of one shard with matrices of 32 n x 128 and vectors of 8 n weights."""
    specs = [TensorSpec("model.layers.0.mlp.down_proj.weight", "BF16", (32, 128))]
    for number, (kind, n) in enumerate(modules):
        name = f"model.layers.{number}.{'mlp.up_proj' if kind == 'up_proj' else 'input_layernorm'}.weight"
        specs.append(TensorSpec(name, "BF16", (32 * n, 128) if kind == "up_proj" else (8 * n,)))
    planned = plan_file(specs)
    tensors = {s.name: TensorRef(s.name, SHARD, s.dtype, s.shape, *planned.offsets[s.name]) for s in specs}
    shard = Shard(SHARD, planned.size_bytes, None, "")
    return make_plan(Checkpoint("tiny", None, (shard,), tensors, CONFIG, b"{}", None, (), ()), make_recipe("W4A16"))


def test_a_shard_without_tasks_passes_by_in_pieces() -> None:
    spans = cut_spans(SHARD, 2 * SPAN_BYTES + 1, [])
    assert [s.size_bytes for s in spans] == [SPAN_BYTES, SPAN_BYTES, 1]
    assert not any(s.bundles for s in spans)


@pytest.mark.parametrize("over", [0, 1])
def test_two_tasks_share_a_span_up_to_its_size(over: int) -> None:
    half = SPAN_BYTES // 2
    spans = cut_spans(SHARD, SPAN_BYTES + over, [copy(0, 0, half), copy(1, half, half + over)])
    assert len(spans) == 1 + over


@pytest.mark.parametrize("apart_bytes", [0, BOND_BYTES])
def test_what_waits_for_each_other_comes_together_if_it_is_near(apart_bytes: int) -> None:
    size = SPAN_BYTES // 2 + 1
    end = 2 * size + apart_bytes
    bundles = [copy(0, 0, size, "qk"), copy(1, size, apart_bytes or 1), copy(2, size + (apart_bytes or 1), size, "qk")]
    spans = cut_spans(SHARD, end + 1, bundles)
    check_homes(spans, bundles)
    together = any({0, 2} <= {b.id for b in s.bundles} for s in spans)
    assert together == (apart_bytes == 0)
    assert len(cut_spans(SHARD, end + 1, [copy(b.id, *_span(b)) for b in bundles])) > 1


def _span(b: Bundle) -> tuple[int, int]:
    begin, end = b.extent
    return begin, end - begin


def test_what_an_interrupted_run_left_fits_the_same_pieces() -> None:
    sizes = [SPAN_BYTES * n // 100 for n in (30, 40, 35, 20, 50)]
    bundles = [copy(n, sum(sizes[:n]), size) for n, size in enumerate(sizes)]
    whole = cut_spans(SHARD, sum(sizes), bundles)
    kept = keep_bundles(whole, bundles[1:])
    anew = cut_spans(SHARD, sum(sizes), bundles[1:])
    assert max(s.size_bytes for s in anew) > max(s.size_bytes for s in whole)
    assert [(s.begin, s.end) for s in kept] == [(s.begin, s.end) for s in whole]
    check_homes(kept, bundles[1:])
