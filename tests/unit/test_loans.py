"""What range mode borrows: which bytes, in which requests, on how much disk; and when it is known to be right."""

import hashlib
import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardq.loans import BLOCK_BYTES, Digest, Loan, Range, RangeDigest, plan_loans
from shardq.onepass import OnePass
from shardq.plans import make_plan
from shardq.proofs import Proofs, find_proven
from shardq.recipe import make_recipe
from shardq.spans import Span, cut_all
from shardq.tasks import Bundle

Sizes = list[tuple[int, int]]  # gap, length
SIZES = st.lists(st.tuples(st.integers(0, 30), st.integers(1, 40)), min_size=1, max_size=12)


def loan_of(sizes: Sizes, scale: int = 1) -> Loan:
    ranges, at = [], 0
    for number, (gap, length) in enumerate(sizes):
        ranges.append(Range(at + gap * scale, at + (gap + length) * scale, f"t{number}"))
        at = ranges[-1].end
    return Loan("home", "donor", tuple(ranges))


@given(SIZES, st.integers(0, 20), st.integers(1, 50), st.lists(st.integers(1, 37), min_size=1, max_size=5))
def test_digest_is_the_same_however_the_bytes_pass(sizes: Sizes, tail: int, window: int, steps: list[int]) -> None:
    loan = loan_of(sizes)
    content = bytes(i * 37 % 251 for i in range(loan.ranges[-1].end + tail))
    wanted = [content[r.begin : r.end] for r in loan.ranges]
    expected = Digest(hashlib.sha256(b"".join(wanted)).hexdigest(), tuple(map(zlib.crc32, wanted)))
    passing, at, number = RangeDigest(loan), 0, 0
    found = bytearray(len(content))
    while at < len(content):
        piece = memoryview(content)[at : at + steps[number % len(steps)]]
        for place, part in passing.take(at, piece):
            found[place : place + len(part)] = part
        at, number = at + len(piece), number + 1
    assert passing.digest() == expected
    assert [bytes(found[r.begin : r.end]) for r in loan.ranges] == wanted
    for gap in (0, 7):
        asked = RangeDigest(loan)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("shardq.loans.GAP_BYTES", gap)
            patch.setattr("shardq.loans.WINDOW_BYTES", window)
            requests = loan.requests
        assert max(end - begin for begin, end in requests) <= window
        for begin, end in requests:
            asked.take(begin, memoryview(content)[begin:end])
        assert asked.digest() == expected


@given(SIZES)
def test_requests_leave_large_gaps_out(sizes: Sizes) -> None:
    loan = loan_of(sizes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("shardq.loans.GAP_BYTES", 10)
        gaps = sum(gap for gap, _ in sizes[1:] if gap <= 10)
        assert loan.read_bytes == sum(length for _, length in sizes) + gaps


@pytest.mark.parametrize("scale", [1, 100, 1000, 7001])
def test_disk_is_at_least_what_the_file_takes(tmp_path: Path, scale: int) -> None:
    loan = loan_of([(n % 7, 1 + n % 5) for n in range(700)], scale)
    path = tmp_path / "lent"
    with path.open("wb") as f:
        os.ftruncate(f.fileno(), loan.ranges[-1].end + 1_000_000)
        for r in loan.ranges:
            os.pwrite(f.fileno(), b"x" * (r.end - r.begin), r.begin)
        os.fsync(f.fileno())
    assert path.stat().st_blocks * 512 <= loan.disk_bytes
    whole = sum(r.end - r.begin for r in loan.ranges)
    assert loan.disk_bytes <= whole + (2 * len(loan.ranges) + 4) * BLOCK_BYTES


def test_loans_are_companions_that_come_without_their_codes(make_checkpoint: Callable[..., Any]) -> None:
    """What lies in one piece with its codes is not borrowed."""
    q, k, o = (f"model.layers.0.self_attn.{p}_proj" for p in "qko")
    shards = {
        "a.safetensors": {
            f"{q}.weight": ("F8_E4M3", (256, 256)),
            f"{q}.weight_scale_inv": ("F32", (2, 2)),
            f"{k}.weight": ("F8_E4M3", (256, 256)),
        },
        "b.safetensors": {
            f"{k}.weight_scale_inv": ("F32", (2, 2)),
            f"{o}.weight": ("BF16", (256, 256)),
        },
    }
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}, "num_hidden_layers": 1}
    checkpoint = make_checkpoint(shards, config)
    work = OnePass((make_plan(checkpoint, make_recipe("W4A16")),))
    tensors = checkpoint.tensors
    near, far = (tensors[f"{module}.weight_scale_inv"] for module in (q, k))
    assert near.end <= tensors[f"{q}.weight"].begin  # pieces begin with codes
    assert plan_loans(cut_all(work)) == {
        "a.safetensors": (
            Loan("a.safetensors", "a.safetensors", (Range(near.begin, near.end, near.name),)),
            Loan("a.safetensors", "b.safetensors", (Range(far.begin, far.end, far.name),)),
        )
    }
    whole = {name: (Span(name, 0, size, bundles_of(work, name)),) for name, size in sizes(work).items()}
    assert [loan.donor for loan in plan_loans(whole)["a.safetensors"]] == ["b.safetensors"]


def bundles_of(work: OnePass, name: str) -> tuple[Bundle, ...]:
    return tuple(b for b in work.bundles if b.shard == name)


def sizes(work: OnePass) -> dict[str, int]:
    return {s.name: s.size_bytes for s in work.checkpoint.shards}


# --- proofs ---------------------------------------------------------------------------------------------------------

A, B = Loan("h", "a", (Range(0, 1, "x"), Range(1, 2, "y"))), Loan("h", "b", (Range(0, 1, "z"),))
GOOD, BAD = Digest("good", (1, 2)), Digest("bad", (1, 3))


@pytest.mark.parametrize("lent_first", [False, True])
def test_loan_is_right_once_both_have_passed(lent_first: bool) -> None:
    proofs = Proofs((A, B), {})
    calls = [proofs.take_passed, proofs.take_lent]
    first, second = reversed(calls) if lent_first else calls
    assert first({A.pair: GOOD}) == set()
    assert proofs.are_open(["h"], ["a"])
    assert second({A.pair: GOOD}) == {"h"}
    assert second({A.pair: GOOD}) == set()  # news only once
    assert not proofs.are_open(["h"], ["a"])
    assert proofs.are_open(["h"], ["a", "b"])
    assert not proofs.are_open(["a", "b"], ["a", "b"])
    assert proofs.mismatch("label") is None


@pytest.mark.parametrize("lent_first", [False, True])
def test_wrong_loan_is_named_and_stays_open(lent_first: bool) -> None:
    proofs = Proofs((A,), {})
    if lent_first:
        proofs.take_lent({A.pair: BAD})
    proofs.take_passed({A.pair: GOOD})
    if not lent_first:
        proofs.take_lent({A.pair: BAD})
    assert proofs.are_open(["h"], ["a"])
    assert str(proofs.mismatch("org/model")).startswith("org/model, shard a: y came otherwise than when it was read")


def test_what_an_earlier_run_saw_pass_counts() -> None:
    proofs = Proofs((A, B), {A.pair: "good", ("gone", "a"): "bad"})
    assert proofs.has("a")
    assert not proofs.has("b")
    assert proofs.take_lent({A.pair: BAD}) == set()
    assert "shard a: x" in str(proofs.mismatch("org/model"))  # which of them is not known
    proofs = Proofs((A,), {A.pair: "good"})
    assert proofs.take_lent({A.pair: GOOD}) == {"h"}


def test_shard_that_borrows_nothing_after_all_is_not_open() -> None:
    proofs = Proofs((A, B), {})
    proofs.drop("h")
    assert not proofs.are_open(["h"], ["a", "b"])
    assert proofs.take_passed({A.pair: GOOD}) == set()


class FakeLane:
    """As much of a lane as is asked."""

    def __init__(self, **files: tuple[str, ...]) -> None:
        self.files = {name: type("File", (), {"name": name, "shards": shards}) for name, shards in files.items()}
        self.sealed = {"done": ("sha256", 1)}


@pytest.mark.parametrize(
    ("known", "busy", "measured", "proven"),
    [
        (["a", "b"], {"h"}, set(), {"a", "b"}),
        (["a"], {"h"}, set(), {"a"}),
        (["a", "b"], {"h", "a"}, set(), {"b"}),
        (["a", "b"], {"h"}, {"b"}, {"a"}),
        ([], {"h"}, set(), set()),
    ],
)
def test_shard_that_only_lends_need_not_come_again(
    known: list[str], busy: set[str], measured: set[str], proven: set[str]
) -> None:
    lane: Any = FakeLane(h=("h", "a", "b"), done=("a", "c"))
    proofs = Proofs((A, B), {("h", s): "good" for s in known})
    assert find_proven([lane], busy, proofs, measured) == proven
