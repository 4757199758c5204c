"""Range mode with quantized sources: codes come in pieces of memory, and what stands beside them in another place is
borrowed. The output is that of a local run, and nothing made of bytes that were not verified is kept."""

import importlib
import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import shardq
from shardq import Limits, Progress, make_recipe
from shardq.ahead import AheadReader
from shardq.checkpoint import TensorRef
from shardq.errors import BudgetTooSmall, ChecksumMismatch, NonFiniteWeight
from shardq.files.safetensors import TensorSpec, plan_file
from shardq.lender import Lender
from shardq.loans import Digest, Loan
from shardq.needs import count_requests, disk_bytes, lent_bytes
from shardq.onepass import OnePass
from shardq.reports import describe_needs
from shardq.run import Order, quantize_all, quantize_to_folder
from shardq.sources.base import Source
from shardq.sources.hub import HubReader
from shardq.spans import largest_span_bytes

with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(Path(__file__).parent)
    sources: Any = importlib.import_module("encoded_sources")

CASES: Mapping[str, Any] = sources.CASES
PLACES: Mapping[str, Any] = sources.PLACES
FLOATS = ("fp8_block", "nvfp4_ct", "mxfp4_ct", "bnb4_nested")
INTEGERS = ("gptq_v1", "gptq_act_order", "int_pack_zeros", "awq")  # GPTQ and AWQ have codes along lines
EXPERTS = tuple(name for name, case in CASES.items() if case.kinds & {"mxfp4_gptoss", "fp8_3d"})
KINDS = (*FLOATS, *INTEGERS, *EXPERTS)
HERE = Path(__file__).parent
LIMIT_S = 60.0  # for anything that takes a second on an idle machine
Report = Callable[[Progress], None]
MakeModel = Callable[[Path], Any]
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory without a name is there on Linux only")


def by_layer(name: str) -> int:
    """Companions in the first shard, which has nothing else, and a shard for each layer."""
    found = sources.LAYER.search(name)
    return 1 if sources.COMPANION.search(name) else 2 + (int(found[1]) if found else 0)


def write(tmp_path: Path, case: str, place: str | None = None) -> Path:
    folder: Path = sources.write_source(CASES[case], tmp_path / "written" / "model")
    if place is None:
        return folder
    where, shards = (by_layer, 3) if place == "by_layer" else PLACES[place]
    out: Path = sources.scatter(folder, tmp_path / "source" / "model", where, shards)
    return out


def run(
    source: Source, out: Path, stream: bool = True, parallel: int = 1, report: Report = lambda _: None,
    scheme: str = "W4A16", cap: int | None = None,
) -> None:  # fmt: skip
    limits = Limits(parallel=parallel, stream=stream, max_disk_bytes=cap)
    quantize_to_folder(source, make_recipe(scheme), out, limits, False, report)


def local(folder: Path, out: Path, scheme: str = "W4A16") -> dict[str, bytes]:
    shardq.quantize(folder, scheme, output_dir=out, limits=Limits(parallel=1))
    return shards(out)


def shards(out: Path) -> dict[str, bytes]:
    assert (out / "config.json").exists()
    assert not (out / ".shardq").exists()
    return {p.name: p.read_bytes() for p in out.glob("*.safetensors")}


def work_of(folder: Path, scheme: str = "W4A16") -> OnePass:
    return OnePass((shardq.plan(folder, scheme),))


def loans_of(folder: Path) -> list[Loan]:
    return [loan for own in work_of(folder).loans.values() for loan in own]


def stop_after(tasks: int) -> Report:
    left = tasks

    def report(step: Progress) -> None:
        nonlocal left
        left -= step.stage == "work"
        if left == 0:
            raise KeyboardInterrupt

    return report


# --- equal bytes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", [None, *PLACES])
@pytest.mark.parametrize("case", KINDS)
def test_stream_writes_what_a_local_run_writes(
    case: str, place: str | None, make_model: MakeModel, tmp_path: Path, short_spans: int
) -> None:
    folder = write(tmp_path, case, place)
    model, expected = make_model(folder), local(folder, tmp_path / "local")
    run(model.open(), tmp_path / "out", parallel=1 if case in FLOATS else 2)
    assert shards(tmp_path / "out") == expected
    if place:
        assert loans_of(folder)
        assert shardq.verify(tmp_path / "out").problems == ()


@pytest.mark.parametrize("gap_bytes", [0, 1 << 20])
@pytest.mark.parametrize("place", [None, *PLACES])
@pytest.mark.parametrize("case", ["fp8_block", "gptq_v1", *EXPERTS[:1]])
def test_all_shards_and_the_loans_come_once_and_nothing_else(
    case: str, place: str | None, gap_bytes: int, make_model: MakeModel, tmp_path: Path, short_spans: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("shardq.loans.GAP_BYTES", gap_bytes)
    monkeypatch.setattr("shardq.loans.WINDOW_BYTES", 3_000)
    folder = write(tmp_path, case, place)
    model, work = make_model(folder), work_of(folder)
    source = model.open()
    model.forget()
    run(source, tmp_path / "out")
    bodies = sum(s.sent_bytes for shard in model.shards for s in model.asked(shard))
    assert bodies == sum(s.size_bytes for s in work.checkpoint.shards) + lent_bytes(work)
    promised = count_requests(work, stream=True)
    assert sum(len(model.hub.seen(model.store(s))) for s in model.shards) == promised.storage
    assert len(model.hub.seen("/resolve/")) == promised.hub


def test_companions_that_come_with_their_codes_are_not_borrowed(tmp_path: Path, short_spans: int) -> None:
    """Zero points of GPTQ lie between codes, being of the same type; only those at the edges of pieces are missed."""
    lent = {r.tensor for loan in loans_of(write(tmp_path, "gptq_v1")) for r in loan.ranges}
    zeros = {n for n in shardq.plan(tmp_path / "written" / "model").checkpoint.tensors if n.endswith("qzeros")}
    assert 0 < len(zeros & lent) < len(zeros) / 2


@pytest.mark.parametrize("window_bytes", [8 << 20, 20_000])
@pytest.mark.parametrize("scheme", ["NVFP4A16", "FP8_TENSOR"])
@pytest.mark.parametrize("place", [None, "gate_and_up_apart", "numbers_apart"])
@pytest.mark.parametrize("case", ["fp8_block", "gptq_v1", "int_pack_zeros", "mxfp4_ct", *EXPERTS[:1]])
def test_encoded_tensors_are_read_ahead(
    case: str, place: str | None, scheme: str, window_bytes: int, make_model: MakeModel, tmp_path: Path,
    short_spans: int, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("shardq.ahead.WINDOW_BYTES", window_bytes)
    monkeypatch.setattr("shardq.ahead.TILE_BYTES", window_bytes // 2)
    folder = write(tmp_path, case, place)
    model, expected = make_model(folder), local(folder, tmp_path / "local", scheme)
    ahead: list[str] = []
    read = AheadReader._read

    def note(reader: AheadReader, t: TensorRef) -> float:
        ahead.append(t.name)
        return read(reader, t)

    monkeypatch.setattr(AheadReader, "_read", note)
    source = model.open()
    model.forget()
    run(source, tmp_path / "out", scheme=scheme)
    assert shards(tmp_path / "out") == expected
    promised = count_requests(work_of(folder, scheme), stream=True)
    assert sum(len(model.hub.seen(model.store(s))) for s in model.shards) <= promised.storage
    assert len(model.hub.seen("/resolve/")) <= promised.hub
    if place == "gate_and_up_apart" and scheme == "NVFP4A16" and case not in EXPERTS:
        assert ahead


def test_several_outputs_from_one_read(make_model: MakeModel, tmp_path: Path, short_spans: int) -> None:
    folder = write(tmp_path, "fp8_block", "donor_cycle")
    model, schemes = make_model(folder), ("W4A16", "NVFP4A16", "W8A16")
    orders = [Order(make_recipe(s), tmp_path / s) for s in schemes]
    for report in (stop_after(5), stop_after(20), lambda _: None):
        try:
            limits = Limits(parallel=1, stream=True)
            quantize_all(model.open(), orders, limits, False, report, lambda plan: plan)
        except KeyboardInterrupt:
            continue
    for s in schemes:
        assert shards(tmp_path / s) == local(folder, tmp_path / f"local {s}", s)


# --- wrong bytes ----------------------------------------------------------------------------------------------------


class Flip:
    """The lender gets one byte of a tensor changed, once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, loan: Loan, at: int, mask: int) -> None:
        self.done = False
        lending = set[tuple[int, str]]()  # threads, and for whom
        read_loan, read_into = Lender._read, HubReader.read_into

        def note(lender: Lender, wanted: Loan, keeps: bool) -> Digest:
            lending.add((threading.get_ident(), wanted.home))
            try:
                return read_loan(lender, wanted, keeps)
            finally:
                lending.clear()

        def read(reader: HubReader, begin: int, out: memoryview) -> None:
            read_into(reader, begin, out)
            mine = (threading.get_ident(), loan.home) in lending and reader._file.name == loan.donor
            if mine and begin <= at < begin + out.nbytes and not self.done:
                out[at - begin] ^= mask
                self.done = True

        monkeypatch.setattr(Lender, "_read", note)
        monkeypatch.setattr(HubReader, "read_into", read)


@pytest.mark.parametrize("mask", [0x01, 0x7F], ids=["bit", "many"])  # the latter makes NaN of some
@pytest.mark.parametrize("number", [0, -1])
@pytest.mark.parametrize("place", [None, *PLACES])
@pytest.mark.parametrize("case", ["fp8_block", "gptq_act_order", "nvfp4_ct"])
def test_flipped_bit_in_what_is_lent_is_found_and_the_next_run_is_right(
    case: str, place: str | None, number: int, mask: int, make_model: MakeModel, tmp_path: Path, short_spans: int,
) -> None:  # fmt: skip
    folder = write(tmp_path, case, place)
    model, expected = make_model(folder), local(folder, tmp_path / "local", "NVFP4A16")
    loan = loans_of(folder)[number]
    wrong, out = loan.ranges[number], tmp_path / "out"
    with pytest.MonkeyPatch.context() as patched:
        flip = Flip(patched, loan, wrong.end - 1, mask)
        with pytest.raises(ChecksumMismatch, match=re.escape(f"shard {loan.donor}: {wrong.tensor} ")):
            run(model.open(), out, scheme="NVFP4A16")
    assert flip.done
    sealed = {p.name: p.read_bytes() for p in (out / ".shardq" / "ready").glob("*.safetensors")}
    assert sealed.items() <= expected.items()
    run(model.open(), out, scheme="NVFP4A16")
    assert shards(out) == expected


@pytest.mark.parametrize("place", [*PLACES])
@pytest.mark.parametrize("number", [0, 1, 2])
def test_shard_with_a_wrong_hash_comes_again_and_its_loans_do_not(
    place: str, number: int, make_model: MakeModel, tmp_path: Path, short_spans: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether it lends, borrows, or both."""
    folder = write(tmp_path, "int_pack_zeros", place)
    work = work_of(folder)
    shard = work.checkpoint.shards[number % len(work.checkpoint.shards)]
    model, expected = make_model(folder), local(folder, tmp_path / "local")
    corrupt_span(monkeypatch, shard.name, shard.size_bytes - 1)
    source = model.open()
    model.forget()
    steps: list[Progress] = []
    run(source, tmp_path / "out", report=steps.append)
    assert shards(tmp_path / "out") == expected
    sent = sum(s.sent_bytes for name in model.shards for s in model.asked(name))
    assert sent == sum(s.size_bytes for s in work.checkpoint.shards) + shard.size_bytes + lent_bytes(work)
    assert steps[-1].done_bytes == steps[-1].total_bytes


def corrupt_span(monkeypatch: pytest.MonkeyPatch, shard: str, at: int, times: int = 1, mask: int = 0xFF) -> None:
    """What is streamed of a shard has one byte wrong; what is lent of it has not."""
    lending, left = set[int](), times
    read_loan, read_into = Lender._read, HubReader.read_into

    def note(lender: Lender, loan: Loan, keeps: bool) -> Digest:
        lending.add(threading.get_ident())
        return read_loan(lender, loan, keeps)

    def read(reader: HubReader, begin: int, out: memoryview) -> None:
        nonlocal left
        read_into(reader, begin, out)
        streamed = reader._file.name == shard and threading.get_ident() not in lending
        if streamed and begin <= at < begin + out.nbytes and left:
            out[at - begin] ^= mask
            left -= 1

    monkeypatch.setattr(Lender, "_read", note)
    monkeypatch.setattr(HubReader, "read_into", read)


def test_shard_that_is_wrong_every_time_is_refused(make_model: MakeModel, tmp_path: Path, short_spans: int) -> None:
    folder = write(tmp_path, "fp8_block", "donor_cycle")
    model, expected = make_model(folder), local(folder, tmp_path / "local")
    name = model.shards[1]
    with pytest.MonkeyPatch.context() as patched:
        corrupt_span(patched, name, work_of(folder).checkpoint.shards[1].size_bytes - 1, times=100)
        with pytest.raises(ChecksumMismatch, match=rf"{name}.*sha256.*2 times in a row"):
            run(model.open(), tmp_path / "out")
    run(model.open(), tmp_path / "out")
    assert shards(tmp_path / "out") == expected


@pytest.mark.parametrize("times", [1, 100])
@pytest.mark.parametrize("scheme", ["W4A16", "NVFP4A16"])
@pytest.mark.parametrize("place", [None, "donor_cycle"])
def test_code_that_arrives_as_nan_is_not_the_checkpoints_fault(
    place: str | None, scheme: str, times: int, make_model: MakeModel, tmp_path: Path, short_spans: int,
) -> None:  # fmt: skip
    """Tasks see what has come before its hash is known."""
    folder = write(tmp_path, "fp8_block", place)
    model, expected = make_model(folder), local(folder, tmp_path / "local", scheme)
    codes = shardq.plan(folder).checkpoint.tensors["model.layers.1.self_attn.k_proj.weight"]
    with (folder / codes.shard).open("rb") as f:
        f.seek(codes.begin)
        mask = f.read(1)[0] ^ 0x7F
    with pytest.MonkeyPatch.context() as patched:
        corrupt_span(patched, codes.shard, codes.begin, times, mask)
        if times > 1:
            with pytest.raises(ChecksumMismatch, match="2 times in a row"):
                run(model.open(), tmp_path / "out", scheme=scheme)
        else:
            run(model.open(), tmp_path / "out", scheme=scheme)
    if times > 1:
        run(model.open(), tmp_path / "out", scheme=scheme)
    assert shards(tmp_path / "out") == expected


def find_scale(folder: Path) -> TensorRef:
    tensors = shardq.plan(folder).checkpoint.tensors.values()
    return next(t for t in tensors if t.name.endswith("k_proj.weight_scale_inv") and "layers.1" in t.name)


@pytest.mark.parametrize("scheme", ["W4A16", "NVFP4A16"])
@pytest.mark.parametrize("place", [None, *PLACES])
def test_scale_that_is_nan_is_the_checkpoints_fault(
    place: str | None, scheme: str, make_model: MakeModel, tmp_path: Path, short_spans: int
) -> None:
    """Which is known only when all shards that the weight is made of have passed."""
    folder = write(tmp_path, "fp8_block", place)
    scale = find_scale(folder)
    with (folder / scale.shard).open("r+b") as f:
        f.seek(scale.begin)
        f.write(b"\xff\xff\xff\xff")
    with pytest.raises(NonFiniteWeight, match=r"layers\.1\.self_attn\.k_proj"):
        run(make_model(folder).open(), tmp_path / "out", scheme=scheme)
    assert {p.name for p in (tmp_path / "out").iterdir()} == {".shardq"}


@pytest.mark.parametrize("place", [None, *PLACES])
def test_scale_that_is_lent_as_nan_is_the_networks_fault(
    place: str | None, make_model: MakeModel, tmp_path: Path, short_spans: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write(tmp_path, "fp8_block", place)
    loan = loans_of(folder)[0]
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
        run(make_model(folder).open(), tmp_path / "out")


# --- stopped and run again ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("first", "second"), [(True, True), (True, False), (False, True)], ids=str)
@pytest.mark.parametrize("place", ["donor_cycle", "scales_first", "gate_and_up_apart", "by_layer"])
@pytest.mark.parametrize("scheme", ["W4A16", "NVFP4A16"])
def test_resumes_anywhere(
    place: str, scheme: str, first: bool, second: bool, make_model: MakeModel, tmp_path: Path, short_spans: int
) -> None:
    """In range mode from range mode, in another mode, and with shards that another mode has staged."""
    folder = write(tmp_path, "fp8_block", place)
    model, expected = make_model(folder), local(folder, tmp_path / "local", scheme)
    tasks = len(shardq.plan(folder, scheme).tasks)
    for number in (1, tasks // 2, tasks - 1):
        out = tmp_path / f"out{number}"
        with pytest.raises(KeyboardInterrupt):
            run(model.open(), out, first, report=stop_after(number), scheme=scheme)
        run(model.open(), out, second, 2, scheme=scheme)
        assert shards(out) == expected


def test_shard_that_only_lends_and_has_passed_does_not_come_again(
    make_model: MakeModel, tmp_path: Path, short_spans: int
) -> None:
    folder = write(tmp_path, "int_pack_zeros", "by_layer")
    model, work, out = make_model(folder), work_of(folder), tmp_path / "out"

    def stop(step: Progress) -> None:
        if step.done_files == 1:
            raise KeyboardInterrupt

    source = model.open()
    with pytest.raises(KeyboardInterrupt):
        run(source, out, report=stop)
    sealed = {p.name for p in (out / ".shardq" / "ready").iterdir()}
    assert (out / ".shardq" / "lent").exists()
    model.forget()
    run(source, out)
    assert shards(out) == local(folder, tmp_path / "local")
    left = [loan for loan in loans_of(folder) if loan.home not in sealed]
    sizes = {s.name: s.size_bytes for s in work.checkpoint.shards}
    sent = {name: sum(x.sent_bytes for x in model.asked(name)) for name in model.shards}
    donor, *homes = model.shards
    assert sent.pop(donor) == sum(loan.read_bytes for loan in left)
    assert sent == {name: 0 if name in sealed else sizes[name] for name in homes}


def test_wrong_loan_is_found_by_what_an_earlier_run_saw_pass(
    make_model: MakeModel, tmp_path: Path, short_spans: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write(tmp_path, "int_pack_zeros", "by_layer")
    model, out = make_model(folder), tmp_path / "out"

    def stop(step: Progress) -> None:
        if step.done_files == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(model.open(), out, report=stop)
    sealed = {p.name for p in (out / ".shardq" / "ready").iterdir()}
    loan = next(loan for loan in loans_of(folder) if loan.home not in sealed)
    with pytest.MonkeyPatch.context() as patched:
        Flip(patched, loan, loan.ranges[3].begin, 0x10)
        with pytest.raises(ChecksumMismatch, match=rf"shard {loan.donor}: .*{loan.home}"):
            run(model.open(), out)
    run(model.open(), out)
    assert shards(out) == local(folder, tmp_path / "local")


@pytest.mark.parametrize("place", ["by_layer", "donor_cycle"])
def test_killed_run_goes_on(
    place: str, make_model: MakeModel, tmp_path: Path, short_spans: int, journal_lines: Callable[[Path, str], int]
) -> None:
    folder = write(tmp_path, "gptq_v1", place)
    model, out, work = make_model(folder), tmp_path / "out", tmp_path / "out" / ".shardq"
    words = ["quantize", model.repo, "-o", str(out), "--parallel", "2", "--stream"]
    shard = model.shards[-1]
    model.add_fault("trickle", model.store(shard), at=5_000, rate_bytes_s=3_000.0, skip=3)
    process = subprocess.Popen(
        [sys.executable, "-P", str(HERE / "short_span_cli.py"), *words],
        env=model.environment(tmp_path, "SPAN_BYTES", short_spans),
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline_s = time.monotonic() + LIMIT_S
        while not (model.hub.faults[0].times == 0 and any(p.is_file() for p in (work / "lent").rglob("*"))):
            assert process.poll() is None
            assert time.monotonic() < deadline_s, "nothing happens"
            time.sleep(0.005)
    finally:
        process.kill()
        process.wait()
    assert {p.name for p in out.iterdir()} == {".shardq"}
    model.hub.faults.clear()
    strays = [work / "lent" / "old" / "file", work / "src" / f"{shard}.0123.part"]  # nobody has counted their disk
    for path in strays:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"of an earlier run")
    seen: set[bool] = set()
    run(model.open(), out, report=lambda step: seen.update(p.exists() for p in strays if step.stage == "work"))
    assert seen == {False}
    assert shards(out) == local(folder, tmp_path / "local")


# --- measured -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of some MB, with a scale for each 16 weights, so that blocks and records are small against them."""
    models = importlib.import_module("encoded_models")
    kind = next(k for k in importlib.import_module("encoded_kinds").ROWS if k.id == "nvfp4_ct")
    layers = range(4)
    case = replace(
        CASES["nvfp4_ct"],
        config={**CASES["nvfp4_ct"].config, "num_hidden_layers": len(layers), "hidden_size": 1024},
        pieces=lambda: (p for n in layers for p in models.mlp(f"model.layers.{n}.mlp", 1024, 1024, kind.encode)),
    )
    folder: Path = sources.write_source(case, tmp_path_factory.mktemp("wide") / "model")
    return folder


def cycle(name: str) -> int:
    """Each shard has the scales of the one before it."""
    layer = int(sources.LAYER.search(name)[1])
    return 1 + (layer + bool(sources.COMPANION.search(name))) % 4


def scales_last(name: str) -> int:
    """The first shards wait for the last one."""
    return 5 if sources.COMPANION.search(name) else 1 + int(sources.LAYER.search(name)[1])


def beside(name: str) -> int:
    """Each layer in a shard of its own."""
    return 1 + int(sources.LAYER.search(name)[1])


@pytest.mark.parametrize("push", [False, True])
@pytest.mark.parametrize(("place", "count"), [(beside, 4), (cycle, 4), (scales_last, 5)])
def test_disk_stays_below_the_least_cap(
    wide: Path, place: Any, count: int, push: bool, push_hub: Any, host_model: Callable[[Path], str], tmp_path: Path,
    short_spans: int, measures: ModuleType,
) -> None:  # fmt: skip
    source = host_model(sources.scatter(wide, tmp_path / "spread" / "model", place, count))
    work, out = OnePass((shardq.plan(source),)), tmp_path / "out"
    cap = disk_bytes(work, staged=False, uploads=push, streamed=True)
    lent = sum(loan.disk_bytes for own in work.loans.values() for loan in own)
    bare = disk_bytes(work, staged=False, uploads=push)
    assert bare < cap <= bare + lent
    assert describe_needs(work)["disk"]["push_stream" if push else "stream"] == cap
    peaks = {"all": 0, "lent": 0}
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.001):
            peaks["all"] = max(peaks["all"], measures.used_bytes(out))
            peaks["lent"] = max(peaks["lent"], measures.used_bytes(out / ".shardq" / "lent"))

    def quantize(cap: int) -> None:
        limits = Limits(parallel=1, max_disk_bytes=cap, stream=True)
        shardq.quantize(source, output_dir=out, limits=limits, push_to="me/small" if push else None)

    with pytest.raises(BudgetTooSmall, match="--max-disk"):
        quantize(cap - 1)
    thread = threading.Thread(target=watch)
    thread.start()
    try:
        quantize(cap)
    finally:
        over.set()
        thread.join()
    assert cap * 0.7 < peaks["all"] <= cap
    assert 0 < peaks["lent"] <= lent
    expected = local(tmp_path / "spread" / "model", tmp_path / "local")
    made = push_hub.files("me/small") if push else shards(out)
    assert {n: d for n, d in made.items() if n.endswith(".safetensors")} == expected


def test_refusal_of_a_staged_run_says_what_range_mode_needs(
    wide: Path, push_hub: Any, host_model: Callable[[Path], str], tmp_path: Path, short_spans: int
) -> None:
    source = host_model(sources.scatter(wide, tmp_path / "spread" / "model", scales_last, 5))
    work = OnePass((shardq.plan(source),))
    with pytest.raises(BudgetTooSmall, match=r"([\d.]+) MB with --stream") as refused:
        shardq.quantize(source, output_dir=tmp_path / "out", limits=Limits(parallel=1, max_disk_bytes=1_000))
    named = re.search(r"([\d.]+) MB with --stream", str(refused.value))
    assert named is not None
    least = disk_bytes(work, staged=False, uploads=False, streamed=True)
    assert least <= round(float(named[1]) * 1_000_000) < least + 10_000


def test_memory_of_the_whole_tree_stays_below_the_cap(
    make_model: MakeModel, tmp_path: Path, measures: ModuleType
) -> None:
    """With pieces of real size, and more to be borrowed than the lender may hold."""
    folder = tmp_path / "giant"
    folder.mkdir()
    config = {**CASES["nvfp4_ct"].config, "num_hidden_layers": 1}
    rows, columns = {"up_proj": 49_152, "gate_proj": 4_096}, 4096
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, n in rows.items():
        module = f"model.layers.0.mlp.{name}"
        shapes[f"{module}.weight_packed"] = ("U8", (n, columns // 2))
        shapes[f"{module}.weight_scale"] = ("F8_E4M3", (n, columns // 16))
        shapes[f"{module}.weight_global_scale"] = ("F32", (1,))
    plan_of_file = plan_file([TensorSpec(name, dtype, shape) for name, (dtype, shape) in shapes.items()])
    with (folder / "model.safetensors").open("wb") as f:
        f.truncate(plan_of_file.size_bytes)
        f.write(plan_of_file.header)
        for begin, end in plan_of_file.offsets.values():
            f.seek(begin)
            f.write(b"\x00\x00\x80\x3f" if end - begin == 4 else b"\x21\x43\x38\x30" * ((end - begin) // 4))
    (folder / "config.json").write_text(json.dumps(config))
    model, work = make_model(folder), work_of(folder)
    assert lent_bytes(work) > 12_000_000
    with pytest.raises(BudgetTooSmall) as refused:
        Limits(parallel=2, stream=True, max_ram_bytes=1).share_memory(work, remote=True, network=True)
    named = re.search(r"expected at least (\d+) MB", str(refused.value))
    assert named is not None
    cap = (int(named[1]) + 1) * 1_000_000
    out, peak = tmp_path / "out", 0
    words = ["quantize", model.repo, "-o", str(out), "-q", "--stream", "--parallel", "2", "--max-ram", f"{cap}B"]
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "shardq.cli", *words],
        env=model.environment(tmp_path, "COLUMNS", 80),
        cwd=tmp_path,
    )
    while process.poll() is None:
        peak = max(peak, measures.anonymous_bytes(process.pid))
        time.sleep(0.01)
    assert process.returncode == 0
    assert 2 * largest_span_bytes(work) < peak < cap
