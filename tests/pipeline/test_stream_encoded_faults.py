"""Wrong bytes in range mode with quantized sources: nothing made of bytes that were not verified is kept."""

import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import encoded_streams as streams
import pytest

import shardq
from shardq import Progress
from shardq.checkpoint import Shard, TensorRef
from shardq.errors import ChecksumMismatch, NonFiniteWeight
from shardq.lender import Lender
from shardq.loans import Digest, Loan
from shardq.pipeline import Pipeline
from shardq.streamer import Passed
from shardq.traffic import lent_bytes

MakeModel = Callable[[Path], Any]
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory without a name is there on Linux only")


# --- wrong bytes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", [0x01, 0x7F], ids=["bit", "many"])  # the latter makes NaN of some
@pytest.mark.parametrize("number", [0, -1])
@pytest.mark.parametrize("place", [None, *streams.PLACES])
@pytest.mark.parametrize("case", ["fp8_block", "gptq_act_order", "nvfp4_ct"])
def test_flipped_bit_in_what_is_lent_is_found_and_the_next_run_is_right(
    case: str, place: str | None, number: int, mask: int, make_model: MakeModel, tmp_path: Path, short_spans: int,
) -> None:  # fmt: skip
    folder = streams.write(tmp_path, case, place)
    model, expected = make_model(folder), streams.local(folder, tmp_path / "local", "NVFP4A16")
    loan = streams.loans_of(folder)[number]
    wrong, out = loan.ranges[number], tmp_path / "out"
    with pytest.MonkeyPatch.context() as patched:
        flip = streams.Flip(patched, loan, wrong.end - 1, mask)
        with pytest.raises(ChecksumMismatch, match=re.escape(f"shard {loan.donor}: {wrong.tensor} ")):
            streams.run(model.open(), out, scheme="NVFP4A16")
    assert flip.done
    sealed = {p.name: p.read_bytes() for p in (out / ".shardq" / "ready").glob("*.safetensors")}
    assert sealed.items() <= expected.items()
    streams.run(model.open(), out, scheme="NVFP4A16")
    assert streams.shards(out) == expected


def test_wrong_loan_is_named_even_if_its_donor_passes_last(
    make_model: MakeModel, tmp_path: Path, short_spans: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A largest magnitude that the wrong scale changed is noticed first then, and is not what went wrong."""
    folder = streams.write(tmp_path, "fp8_block", "donor_cycle")
    loan = streams.loans_of(folder)[-1]
    wrong, held, seen = loan.ranges[-1], list[Passed](), list[str]()
    streams.Flip(monkeypatch, loan, wrong.end - 1, 0x7F)
    on_passed, believe = Pipeline._on_passed, Pipeline._believe

    def hold(pipeline: Pipeline, passed: Passed) -> None:
        if passed.shard.name == loan.donor and not seen:
            held.append(passed)
        else:
            on_passed(pipeline, passed)

    def note(pipeline: Pipeline, shard: Shard) -> bool:
        is_right = believe(pipeline, shard)
        if shard.name == loan.home and not seen and pipeline._doubts.is_contradicted(shard.name):
            seen.append(shard.name)
            for passed in held:
                on_passed(pipeline, passed)
        return is_right

    monkeypatch.setattr(Pipeline, "_on_passed", hold)
    monkeypatch.setattr(Pipeline, "_believe", note)
    with pytest.raises(ChecksumMismatch, match=re.escape(f"shard {loan.donor}: {wrong.tensor} ")):
        streams.run(make_model(folder).open(), tmp_path / "out", scheme="NVFP4A16")
    assert seen


@pytest.mark.parametrize("place", [*streams.PLACES])
@pytest.mark.parametrize("number", [0, 1, 2])
def test_shard_with_a_wrong_hash_comes_again_and_its_loans_do_not(
    place: str, number: int, make_model: MakeModel, tmp_path: Path, short_spans: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether it lends, borrows, or both."""
    folder = streams.write(tmp_path, "int_pack_zeros", place)
    work = streams.work_of(folder)
    shard = work.checkpoint.shards[number % len(work.checkpoint.shards)]
    model, expected = make_model(folder), streams.local(folder, tmp_path / "local")
    streams.corrupt_span(monkeypatch, shard.name, shard.size_bytes - 1)
    source = model.open()
    model.forget()
    steps: list[Progress] = []
    streams.run(source, tmp_path / "out", report=steps.append)
    assert streams.shards(tmp_path / "out") == expected
    sent = sum(s.sent_bytes for name in model.shards for s in model.asked(name))
    assert sent == sum(s.size_bytes for s in work.checkpoint.shards) + shard.size_bytes + lent_bytes(work)
    assert steps[-1].done_bytes == steps[-1].total_bytes


def test_shard_that_is_wrong_every_time_is_refused(make_model: MakeModel, tmp_path: Path, short_spans: int) -> None:
    folder = streams.write(tmp_path, "fp8_block", "donor_cycle")
    model, expected = make_model(folder), streams.local(folder, tmp_path / "local")
    name = model.shards[1]
    with pytest.MonkeyPatch.context() as patched:
        streams.corrupt_span(patched, name, streams.work_of(folder).checkpoint.shards[1].size_bytes - 1, times=100)
        with pytest.raises(ChecksumMismatch, match=rf"{name}.*sha256.*2 times in a row"):
            streams.run(model.open(), tmp_path / "out")
    streams.run(model.open(), tmp_path / "out")
    assert streams.shards(tmp_path / "out") == expected


@pytest.mark.parametrize("times", [1, 100])
@pytest.mark.parametrize("scheme", ["W4A16", "NVFP4A16"])
@pytest.mark.parametrize("place", [None, "donor_cycle"])
def test_code_that_arrives_as_nan_is_not_the_checkpoints_fault(
    place: str | None, scheme: str, times: int, make_model: MakeModel, tmp_path: Path, short_spans: int,
) -> None:  # fmt: skip
    """Tasks see what has come before its hash is known."""
    folder = streams.write(tmp_path, "fp8_block", place)
    model, expected = make_model(folder), streams.local(folder, tmp_path / "local", scheme)
    codes = shardq.plan(folder).checkpoint.tensors["model.layers.1.self_attn.k_proj.weight"]
    with (folder / codes.shard).open("rb") as f:
        f.seek(codes.begin)
        mask = f.read(1)[0] ^ 0x7F
    with pytest.MonkeyPatch.context() as patched:
        streams.corrupt_span(patched, codes.shard, codes.begin, times, mask)
        if times > 1:
            with pytest.raises(ChecksumMismatch, match="2 times in a row"):
                streams.run(model.open(), tmp_path / "out", scheme=scheme)
        else:
            streams.run(model.open(), tmp_path / "out", scheme=scheme)
    if times > 1:
        streams.run(model.open(), tmp_path / "out", scheme=scheme)
    assert streams.shards(tmp_path / "out") == expected


def find_scale(folder: Path) -> TensorRef:
    tensors = shardq.plan(folder).checkpoint.tensors.values()
    return next(t for t in tensors if t.name.endswith("k_proj.weight_scale_inv") and "layers.1" in t.name)


@pytest.mark.parametrize("scheme", ["W4A16", "NVFP4A16"])
@pytest.mark.parametrize("place", [None, *streams.PLACES])
def test_scale_that_is_nan_is_the_checkpoints_fault(
    place: str | None, scheme: str, make_model: MakeModel, tmp_path: Path, short_spans: int
) -> None:
    """Which is known only when all shards that the weight is made of have passed."""
    folder = streams.write(tmp_path, "fp8_block", place)
    scale = find_scale(folder)
    with (folder / scale.shard).open("r+b") as f:
        f.seek(scale.begin)
        f.write(b"\xff\xff\xff\xff")
    with pytest.raises(NonFiniteWeight, match=r"layers\.1\.self_attn\.k_proj"):
        streams.run(make_model(folder).open(), tmp_path / "out", scheme=scheme)
    assert {p.name for p in (tmp_path / "out").iterdir()} == {".shardq"}


@pytest.mark.parametrize("place", [None, *streams.PLACES])
def test_scale_that_is_lent_as_nan_is_the_networks_fault(
    place: str | None, make_model: MakeModel, tmp_path: Path, short_spans: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = streams.write(tmp_path, "fp8_block", place)
    loan = streams.loans_of(folder)[0]
    read = Lender._read

    def lie(lender: Lender, wanted: Loan, keeps: bool) -> Digest:
        digest = read(lender, wanted, keeps)
        if wanted.pair != loan.pair:
            return digest
        with (lender._folder / loan.home / loan.donor).open("r+b") as f:
            for r in loan.ranges:
                f.seek(r.begin)
                f.write(b"\xff" * (r.end - r.begin))
        return replace(digest, sha256="0" * 64)

    monkeypatch.setattr(Lender, "_read", lie)
    with pytest.raises(ChecksumMismatch):
        streams.run(make_model(folder).open(), tmp_path / "out")
