"""Range mode with quantized sources: codes come in pieces of memory, and what stands beside them in another place is
borrowed. The output is that of a local run, however often it is stopped on the way."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import encoded_streams as streams
import pytest
from stopped_runs import stop_after

import shardq
from shardq import Limits, Progress, make_recipe
from shardq.ahead import AheadReader
from shardq.checkpoint import TensorRef
from shardq.errors import ChecksumMismatch
from shardq.run import Order, quantize_all
from shardq.traffic import count_requests, lent_bytes

KINDS = (*streams.FLOATS, *streams.INTEGERS, *streams.EXPERTS)
MakeModel = Callable[[Path], Any]
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory without a name is there on Linux only")


# --- equal bytes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", [None, *streams.PLACES])
@pytest.mark.parametrize("case", KINDS)
def test_stream_writes_what_a_local_run_writes(
    case: str, place: str | None, make_model: MakeModel, tmp_path: Path, short_spans: int
) -> None:
    folder = streams.write(tmp_path, case, place)
    model, expected = make_model(folder), streams.local(folder, tmp_path / "local")
    streams.run(model.open(), tmp_path / "out", parallel=1 if case in streams.FLOATS else 2)
    assert streams.shards(tmp_path / "out") == expected
    if place:
        assert streams.loans_of(folder)
        assert shardq.verify(tmp_path / "out").problems == ()


@pytest.mark.parametrize("gap_bytes", [0, 1 << 20])
@pytest.mark.parametrize("place", [None, *streams.PLACES])
@pytest.mark.parametrize("case", ["fp8_block", "gptq_v1", *streams.EXPERTS[:1]])
def test_all_shards_and_the_loans_come_once_and_nothing_else(
    case: str, place: str | None, gap_bytes: int, make_model: MakeModel, tmp_path: Path, short_spans: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("shardq.loans.GAP_BYTES", gap_bytes)
    monkeypatch.setattr("shardq.loans.WINDOW_BYTES", 3_000)
    folder = streams.write(tmp_path, case, place)
    model, work = make_model(folder), streams.work_of(folder)
    source = model.open()
    model.forget()
    streams.run(source, tmp_path / "out")
    bodies = sum(s.sent_bytes for shard in model.shards for s in model.asked(shard))
    assert bodies == sum(s.size_bytes for s in work.checkpoint.shards) + lent_bytes(work)
    promised = count_requests(work, stream=True)
    assert sum(len(model.hub.seen(model.store(s))) for s in model.shards) == promised.storage
    assert len(model.hub.seen("/resolve/")) == promised.hub


def test_companions_that_come_with_their_codes_are_not_borrowed(tmp_path: Path, short_spans: int) -> None:
    """Zero points of GPTQ lie between codes, being of the same type; only those at the edges of pieces are missed."""
    lent = {r.tensor for loan in streams.loans_of(streams.write(tmp_path, "gptq_v1")) for r in loan.ranges}
    zeros = {n for n in shardq.plan(tmp_path / "written" / "model").checkpoint.tensors if n.endswith("qzeros")}
    assert 0 < len(zeros & lent) < len(zeros) / 2


@pytest.mark.parametrize("window_bytes", [8 << 20, 20_000])
@pytest.mark.parametrize("scheme", ["NVFP4A16", "FP8_TENSOR"])
@pytest.mark.parametrize("place", [None, "gate_and_up_apart", "numbers_apart"])
@pytest.mark.parametrize("case", ["fp8_block", "gptq_v1", "int_pack_zeros", "mxfp4_ct", *streams.EXPERTS[:1]])
def test_encoded_tensors_are_read_ahead(
    case: str, place: str | None, scheme: str, window_bytes: int, make_model: MakeModel, tmp_path: Path,
    short_spans: int, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("shardq.ahead.WINDOW_BYTES", window_bytes)
    monkeypatch.setattr("shardq.ahead.TILE_BYTES", window_bytes // 2)
    folder = streams.write(tmp_path, case, place)
    model, expected = make_model(folder), streams.local(folder, tmp_path / "local", scheme)
    ahead: list[str] = []
    read = AheadReader._read

    def note(reader: AheadReader, t: TensorRef) -> float:
        ahead.append(t.name)
        return read(reader, t)

    monkeypatch.setattr(AheadReader, "_read", note)
    source = model.open()
    model.forget()
    streams.run(source, tmp_path / "out", scheme=scheme)
    assert streams.shards(tmp_path / "out") == expected
    promised = count_requests(streams.work_of(folder, scheme), stream=True)
    assert sum(len(model.hub.seen(model.store(s))) for s in model.shards) <= promised.storage
    assert len(model.hub.seen("/resolve/")) <= promised.hub
    if place == "gate_and_up_apart" and scheme == "NVFP4A16" and case not in streams.EXPERTS:
        assert ahead


def test_several_outputs_from_one_read(make_model: MakeModel, tmp_path: Path, short_spans: int) -> None:
    folder = streams.write(tmp_path, "fp8_block", "donor_cycle")
    model, schemes = make_model(folder), ("W4A16", "NVFP4A16", "W8A16")
    orders = [Order(make_recipe(s), tmp_path / s) for s in schemes]
    for report in (stop_after(5), stop_after(20), lambda _: None):
        try:
            limits = Limits(parallel=1, stream=True)
            quantize_all(model.open(), orders, limits, False, report, lambda plan: plan)
        except KeyboardInterrupt:
            continue
    for s in schemes:
        assert streams.shards(tmp_path / s) == streams.local(folder, tmp_path / f"local {s}", s)


# --- stopped and run again ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("first", "second"), [(True, True), (True, False), (False, True)], ids=str)
@pytest.mark.parametrize("place", ["donor_cycle", "scales_first", "gate_and_up_apart", "by_layer"])
@pytest.mark.parametrize("scheme", ["W4A16", "NVFP4A16"])
def test_resumes_anywhere(
    place: str, scheme: str, first: bool, second: bool, make_model: MakeModel, tmp_path: Path, short_spans: int
) -> None:
    """In range mode from range mode, in another mode, and with shards that another mode has staged."""
    folder = streams.write(tmp_path, "fp8_block", place)
    model, expected = make_model(folder), streams.local(folder, tmp_path / "local", scheme)
    tasks = len(shardq.plan(folder, scheme).tasks)
    for number in (1, tasks // 2, tasks - 1):
        out = tmp_path / f"out{number}"
        with pytest.raises(KeyboardInterrupt):
            streams.run(model.open(), out, first, report=stop_after(number), scheme=scheme)
        streams.run(model.open(), out, second, 2, scheme=scheme)
        assert streams.shards(out) == expected


def test_shard_that_only_lends_and_has_passed_does_not_come_again(
    make_model: MakeModel, tmp_path: Path, short_spans: int
) -> None:
    folder = streams.write(tmp_path, "int_pack_zeros", "by_layer")
    model, work, out = make_model(folder), streams.work_of(folder), tmp_path / "out"

    def stop(step: Progress) -> None:
        if step.done_files == 1:
            raise KeyboardInterrupt

    source = model.open()
    with pytest.raises(KeyboardInterrupt):
        streams.run(source, out, report=stop)
    sealed = {p.name for p in (out / ".shardq" / "ready").iterdir()}
    assert (out / ".shardq" / "lent").exists()
    model.forget()
    streams.run(source, out)
    assert streams.shards(out) == streams.local(folder, tmp_path / "local")
    left = [loan for loan in streams.loans_of(folder) if loan.home not in sealed]
    sizes = {s.name: s.size_bytes for s in work.checkpoint.shards}
    sent = {name: sum(x.sent_bytes for x in model.asked(name)) for name in model.shards}
    donor, *homes = model.shards
    assert sent.pop(donor) == sum(loan.read_bytes for loan in left)
    assert sent == {name: 0 if name in sealed else sizes[name] for name in homes}


def test_wrong_loan_is_found_by_what_an_earlier_run_saw_pass(
    make_model: MakeModel, tmp_path: Path, short_spans: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = streams.write(tmp_path, "int_pack_zeros", "by_layer")
    model, out = make_model(folder), tmp_path / "out"

    def stop(step: Progress) -> None:
        if step.done_files == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        streams.run(model.open(), out, report=stop)
    sealed = {p.name for p in (out / ".shardq" / "ready").iterdir()}
    loan = next(loan for loan in streams.loans_of(folder) if loan.home not in sealed)
    with pytest.MonkeyPatch.context() as patched:
        streams.Flip(patched, loan, loan.ranges[3].begin, 0x10)
        with pytest.raises(ChecksumMismatch, match=rf"shard {loan.donor}: .*{loan.home}"):
            streams.run(model.open(), out)
    streams.run(model.open(), out)
    assert streams.shards(out) == streams.local(folder, tmp_path / "local")


@pytest.mark.parametrize("place", ["by_layer", "donor_cycle"])
def test_killed_run_goes_on(
    place: str, make_model: MakeModel, tmp_path: Path, short_spans: int, journal_lines: Callable[[Path, str], int]
) -> None:
    folder = streams.write(tmp_path, "gptq_v1", place)
    model, out, work = make_model(folder), tmp_path / "out", tmp_path / "out" / ".shardq"
    words = ["quantize", model.repo, "-o", str(out), "--parallel", "2", "--stream"]
    shard = model.shards[-1]
    model.add_fault("trickle", model.store(shard), at=5_000, rate_bytes_s=3_000.0, skip=3)

    def has_lent() -> bool:
        return model.hub.faults[0].times == 0 and any(p.is_file() for p in (work / "lent").rglob("*"))

    model.kill_when(has_lent, words, tmp_path, short_spans)
    assert {p.name for p in out.iterdir()} == {".shardq"}
    model.hub.faults.clear()
    strays = [work / "lent" / "old" / "file", work / "src" / f"{shard}.0123.part"]  # nobody has counted their disk
    for path in strays:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"of an earlier run")
    seen: set[bool] = set()
    streams.run(model.open(), out, report=lambda step: seen.update(p.exists() for p in strays if step.stage == "work"))
    assert seen == {False}
    assert streams.shards(out) == streams.local(folder, tmp_path / "local")
