"""What is believed of bytes that are used before their hash is known."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from shardq.doubts import Doubts, open_doubts
from shardq.errors import ChecksumMismatch, NonFiniteWeight
from shardq.loans import Digest, Loan, Range
from shardq.onepass import OnePass
from shardq.plans import make_plan
from shardq.proofs import Proofs
from shardq.recipe import make_recipe
from shardq.survey import Survey
from shardq.tasks import Bundle, Streamed, Surveyed

A, B = "a.safetensors", "b.safetensors"
Q, K = (f"model.layers.0.self_attn.{p}_proj.weight" for p in "qk")
LOAN = Loan(A, A, (Range(0, 1, Q),))
GOOD = {LOAN.pair: Digest("good", (1,))}
ERROR = NonFiniteWeight("x holds a NaN")


@pytest.fixture
def work(make_checkpoint: Callable[..., Any]) -> OnePass:
    """q in one shard and k in another, which share a scale."""
    shards = {A: {Q: ("BF16", (64, 64))}, B: {K: ("BF16", (64, 64))}}
    config = {"num_hidden_layers": 1, "model_type": "llama"}
    return OnePass((make_plan(make_checkpoint(shards, config), make_recipe("NVFP4A16")),))


def bundle_of(work: OnePass, tensor: str) -> Bundle:
    return next(b for b in work.bundles if b.tensor == tensor)


def doubts_of(work: OnePass, *loans: Loan, survey: Survey | None = None) -> Doubts:
    return Doubts(work, "org/model", Proofs(loans, {}), survey or Survey(work, {}), frozenset())


def contradicted(work: OnePass) -> Survey:
    """Tasks of q were given 2.0, and it is 1.0."""
    survey = Survey(work, {})
    for name in (Q, K):
        survey.take_ahead(name, 2.0)
    survey.wait(Streamed(bundle_of(work, Q), "memory", 0))
    survey.take(Surveyed(Q, work.tensors[Q].begin, 1.0))
    assert len(survey.ready()) == 1
    return survey


def test_what_was_read_is_right_once_hash_and_loans_are(work: OnePass) -> None:
    doubts, bundle = doubts_of(work, LOAN), bundle_of(work, Q)
    assert not doubts.has_read_right(bundle)
    doubts.take_hash(A, is_right=True)
    assert doubts.has_passed(A)
    assert not doubts.has_read_right(bundle)
    doubts.take_lent(GOOD)
    assert not doubts.are_sure({A}, {A})
    assert doubts.take_passed(GOOD) == {A}
    assert doubts.has_read_right(bundle)
    assert doubts.are_sure({A}, {A})
    assert not doubts.are_sure({A, B}, {A, B})
    assert doubts.are_sure({A, B}, {A})  # the other is a file
    assert doubts.mismatch() is None


def test_error_is_believed_once_its_bytes_are_known_to_be_right(work: OnePass) -> None:
    doubts = doubts_of(work, LOAN)
    doubts.take_error(bundle_of(work, Q), ERROR)
    doubts.take_error(bundle_of(work, Q), NonFiniteWeight("another"))
    assert doubts.fault(A) is None
    doubts.take_hash(A, is_right=True)
    assert doubts.fault(A) is None
    doubts.drop_loans(A)
    assert doubts.fault(A) is ERROR
    assert not doubts.are_sure({A}, {A})
    assert doubts.fault(B) is None


def test_shard_that_came_wrong_begins_anew(work: OnePass) -> None:
    doubts = doubts_of(work)
    doubts.take_error(bundle_of(work, Q), ERROR)
    doubts.take_hash(A, is_right=False)
    assert doubts.is_wrong(A)
    assert not doubts.has_passed(A)
    doubts.forget(A)
    assert not doubts.is_wrong(A)
    doubts.take_hash(A, is_right=True)
    assert doubts.fault(A) is None
    assert doubts.are_sure({A}, {A})


def test_magnitude_that_is_another_is_a_fault(work: OnePass) -> None:
    doubts = doubts_of(work, survey=contradicted(work))
    doubts.take_hash(A, is_right=True)
    found = doubts.fault(A)
    assert isinstance(found, ChecksumMismatch)
    assert str(found).startswith(f"org/model, shard {A}: {Q} has another largest magnitude than when it was read ahead")


def test_loan_may_be_to_blame_for_a_magnitude(work: OnePass) -> None:
    doubts = doubts_of(work, LOAN, survey=contradicted(work))
    doubts.take_hash(A, is_right=True)
    assert doubts.fault(A) is None
    assert doubts.is_contradicted(A)
    assert doubts.measured(A) == {}
    doubts.take_lent(GOOD)
    doubts.take_passed(GOOD)
    assert isinstance(doubts.fault(A), ChecksumMismatch)
    assert doubts.measured(A) == {Q: 1.0}


@pytest.mark.parametrize(("streams", "proven"), [(True, {B}), (False, set())])
def test_shard_that_an_earlier_run_saw_pass_and_only_lends_is_right(
    work: OnePass, streams: bool, proven: set[str]
) -> None:
    lane: Any = SimpleNamespace(
        before=SimpleNamespace(lent={(A, B): "good"}), files={"f": SimpleNamespace(name="f", shards=(A, B))}, sealed={}
    )
    survey = Survey(work, {Q: 1.0, K: 1.0})
    left = [bundle_of(work, Q)]
    loans = {A: (Loan(A, B, (Range(0, 1, K),)),)}
    doubts = open_doubts(work, "org/model", [lane], left, loans, survey, streams=streams)
    assert doubts.proven == proven
    assert doubts.has_passed(B) is bool(proven)
    unknown = open_doubts(work, "org/model", [lane], left, loans, Survey(work, {Q: 1.0}), streams=streams)
    assert unknown.proven == set()  # k is needed for its magnitude
