"""Scales that reach beyond a group: what shares one is quantized with the same largest magnitude, wherever its tensors
lie and however they come; what was made with a magnitude that turns out to be wrong is never kept."""

import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from stopped_runs import stop_after

import shardq
from shardq import Limits, Progress, make_recipe
from shardq.admission import Admission, ShardCost
from shardq.ahead import AheadReader
from shardq.checkpoint import TensorRef
from shardq.errors import ChecksumMismatch, NonFiniteWeight
from shardq.onepass import OnePass
from shardq.run import quantize_to_folder
from shardq.sources.base import Source
from shardq.sources.hub import HubReader
from shardq.sources.local import open_folder
from shardq.tasks import Bundle
from shardq.traffic import ahead_bytes, count_requests
from shardq.worker import Worker

Contents = Callable[[Path], dict[str, str]]
WriteMoe = Callable[..., Path]
Q, K, V = (f"model.layers.1.self_attn.{p}_proj.weight" for p in "qkv")
FAR = "model.layers.0.self_attn.v_proj.weight"
SPREADS: dict[str, Callable[[int, str], int]] = {
    "one": lambda _, name: 1,
    "two": lambda place, _: 1 + place % 2,
    "three": lambda place, _: 1 + place % 3,
}
GROUPS = [
    *(tuple(f"model.layers.{n}.self_attn.{p}_proj" for p in "qkv") for n in (0, 1)),
    *(tuple(f"{m}.{p}_proj" for p in ("gate", "up")) for m in ("model.layers.0.mlp", "model.layers.1.mlp.experts.2")),
]


@pytest.fixture(params=SPREADS)
def folder(request: pytest.FixtureRequest, tmp_path: Path, write_moe: WriteMoe, short_spans: int) -> Path:
    """The model in one, two or three shards, no fused group in one piece of the others."""
    return write_moe(tmp_path / "source" / "model", SPREADS[request.param])


@pytest.fixture
def split(tmp_path: Path, write_moe: WriteMoe, short_spans: int) -> Path:
    """The model in three shards."""
    return write_moe(tmp_path / "source" / "model", SPREADS["three"])


def run(
    source: Source, out: Path, stream: bool = True, parallel: int = 1, report: Callable[[Progress], None] | None = None,
    scheme: str = "NVFP4A16",
) -> None:  # fmt: skip
    limits = Limits(parallel=parallel, stream=stream)
    quantize_to_folder(source, make_recipe(scheme), out, limits, False, report or (lambda _: None))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for path in folder.glob("*.safetensors") for k, v in load_file(path).items()}


def local(folder: Path, out: Path, scheme: str = "NVFP4A16") -> dict[str, bytes]:
    shardq.quantize(folder, scheme, output_dir=out, limits=Limits(parallel=1))
    return shards(out)


def shards(out: Path) -> dict[str, bytes]:
    assert (out / "config.json").exists()
    return {p.name: p.read_bytes() for p in out.glob("*.safetensors")}


@pytest.mark.parametrize("scheme", ["NVFP4A16", "FP8_TENSOR"])
def test_same_bytes_in_every_mode(folder: Path, make_model: Callable[[Path], Any], tmp_path: Path, scheme: str) -> None:
    model, expected = make_model(folder), local(folder, tmp_path / "local", scheme)
    shardq.quantize(folder, scheme, output_dir=tmp_path / "local2", limits=Limits(parallel=2))
    assert shards(tmp_path / "local2") == expected
    for stream, parallel in [(False, 1), (True, 1), (True, 2)]:
        out = tmp_path / f"hub{stream}{parallel}"
        run(model.open(), out, stream, parallel, scheme=scheme)
        assert shards(out) == expected, (stream, parallel)
    assert shardq.verify(out, deep=True, source=folder).problems == ()
    check_scales(folder, out, scheme)


def check_scales(folder: Path, out: Path, scheme: str) -> None:
    before, after = weights(folder), weights(out)
    amax = {name.removesuffix(".weight"): w.float().abs().max() for name, w in before.items()}
    if scheme == "FP8_TENSOR":
        for module in (m for group in GROUPS for m in group):
            assert after[f"{module}.weight_scale"].float().item() == (amax[module] / 448).bfloat16().item()
        return
    for group in GROUPS:
        expected = 2688.0 / max(amax[m] for m in group)
        assert len({amax[m].item() for m in group}) > 1
        assert {after[f"{m}.weight_global_scale"].item() for m in group} == {expected.item()}
    assert len({after[f"{group[0]}.weight_global_scale"].item() for group in GROUPS}) > 2


@pytest.mark.parametrize("window_bytes", [8 << 20, 40 << 10])
def test_requests_are_those_that_the_plan_promises(
    folder: Path, make_model: Callable[[Path], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, window_bytes: int
) -> None:
    monkeypatch.setattr("shardq.ahead.WINDOW_BYTES", window_bytes)
    model = make_model(folder)
    source = model.open()
    model.forget()
    run(source, tmp_path / "out")
    work = OnePass((shardq.plan(folder, "NVFP4A16"),))
    promised = count_requests(work, stream=True)
    stored = sum(len(model.hub.seen(model.store(s))) for s in model.shards)
    resolved = len(model.hub.seen("/resolve/"))
    headers = sum(model.hub.seen(model.store(s))[0].sent_bytes for s in model.shards)
    twice = sum(model.sent().values()) - headers - sum(s.size_bytes for s in work.checkpoint.shards)
    assert ahead_bytes(work) > 0
    if len(model.shards) == 1:
        assert (resolved, stored) == (promised.hub, promised.storage)
        assert twice == ahead_bytes(work)
    else:  # what a shard needs of an earlier one may have been measured there
        assert resolved <= promised.hub
        assert 0 < twice <= ahead_bytes(work)
        assert promised.storage // 2 < stored <= promised.storage


def test_file_mode_reads_every_shard_once(split: Path, make_model: Callable[[Path], Any], tmp_path: Path) -> None:
    model = make_model(split)
    source = model.open()
    model.forget()
    run(source, tmp_path / "out", stream=False)
    assert [[s.begin for s in model.asked(shard)] for shard in model.shards] == [[0]] * 3


@pytest.mark.parametrize("mode", ["folder", "file", "stream"])
def test_resumes_anywhere(
    split: Path, make_model: Callable[[Path], Any], tmp_path: Path, contents: Contents, mode: str
) -> None:
    model, tasks = make_model(split), len(shardq.plan(split, "NVFP4A16").tasks)
    expected = local(split, tmp_path / "local")
    for number in (2, tasks // 3, tasks // 2, tasks - 1):
        out = tmp_path / f"out{number}"
        for again in (True, False):
            report = stop_after(number) if again else None
            try:
                if mode == "folder":
                    limits = Limits(parallel=1)
                    shardq.quantize(split, "NVFP4A16", output_dir=out, limits=limits, report=report)
                else:
                    run(model.open(), out, mode == "stream", 1 if again else 2, report)
            except KeyboardInterrupt:
                assert again
        assert shards(out) == expected
    assert shardq.verify(out, deep=True, source=split).problems == ()


# --- wrong bytes ----------------------------------------------------------------------------------------------------


def flip_once(monkeypatch: pytest.MonkeyPatch, tensor: TensorRef, mask: int) -> list[int]:
    """The first span that holds the tensor's first weight comes with its upper byte changed."""
    done: list[int] = []
    ahead: set[int] = set()  # threads
    read_into, read_ahead = HubReader.read_into, AheadReader._read

    def note(reader: AheadReader, tensor: TensorRef) -> float:
        ahead.add(threading.get_ident())
        return read_ahead(reader, tensor)

    def read(reader: HubReader, begin: int, out: memoryview) -> None:
        read_into(reader, begin, out)
        at = tensor.begin + 1 - begin
        is_span = threading.get_ident() not in ahead
        if reader._file.name == tensor.shard and 0 <= at < out.nbytes and is_span and not done:
            out[at] ^= mask
            done.append(begin)

    monkeypatch.setattr(AheadReader, "_read", note)
    monkeypatch.setattr(HubReader, "read_into", read)
    return done


@pytest.mark.parametrize("mask", [0x80, 0x40], ids=["sign", "magnitude"])
@pytest.mark.parametrize("name", [Q, FAR, "model.layers.0.mlp.gate_proj.weight"])
def test_wrong_bytes_in_range_mode_change_nothing(
    folder: Path, make_model: Callable[[Path], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str,
    mask: int,
) -> None:  # fmt: skip
    expected, model, out = local(folder, tmp_path / "local"), make_model(folder), tmp_path / "out"
    flipped = flip_once(monkeypatch, shardq.plan(folder).checkpoint.tensors[name], mask)
    try:
        run(model.open(), out)
    except ChecksumMismatch:  # others had been given the wrong magnitude
        assert mask == 0x40
        assert len(model.shards) > 1
        assert not (out / "config.json").exists()
        run(model.open(), out)
    assert flipped
    assert shards(out) == expected


@pytest.mark.parametrize("factor", [4.0, 0.25])
@pytest.mark.parametrize("name", [Q, K, V])
def test_what_was_read_ahead_wrong_is_found_and_not_kept(
    split: Path, make_model: Callable[[Path], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str,
    factor: float,
) -> None:  # fmt: skip
    expected, model, out = local(split, tmp_path / "local"), make_model(split), tmp_path / "out"
    read, lied = AheadReader._read, []

    def lie(reader: AheadReader, tensor: TensorRef) -> float:
        amax = read(reader, tensor)
        if tensor.name != name or lied:
            return amax
        lied.append(name)
        return amax * factor

    monkeypatch.setattr(AheadReader, "_read", lie)
    message = ""
    try:
        run(model.open(), out)
    except ChecksumMismatch as e:
        message = str(e)
    if message:
        assert lied
        assert f"{name} has another largest magnitude than when it was read ahead" in message
        sealed = {p.name: p.read_bytes() for p in (out / ".shardq" / "ready").glob("*.safetensors")}
        assert sealed.items() <= expected.items()
        run(model.open(), out)
    else:
        assert not lied or factor < 1  # another member may be the largest
    assert shards(out) == expected


def test_partner_that_changed_since_is_taken_as_it_is_now(split: Path, tmp_path: Path, one: Limits) -> None:
    """Of the first shard all work is kept that does not depend on another shard's weights."""
    out, seen = tmp_path / "out", list[int]()
    plan = shardq.plan(split, "NVFP4A16")
    with pytest.raises(KeyboardInterrupt):
        shardq.quantize(split, "NVFP4A16", output_dir=out, limits=one, report=stop_after(len(plan.tasks) - 1))
    tensor = plan.checkpoint.tensors[K]
    with (split / tensor.shard).open("r+b") as f:
        f.seek(tensor.begin)
        f.write(torch.tensor([3.0]).bfloat16().view(torch.uint8).numpy().tobytes())
    shardq.quantize(split, "NVFP4A16", output_dir=out, limits=one, report=lambda step: seen.append(step.resumed_bytes))
    assert seen[-1] > 0
    assert shards(out) == local(split, tmp_path / "fresh")


@pytest.mark.parametrize("mode", ["folder", "file", "stream"])
@pytest.mark.parametrize("value", ["nan", "inf"])
def test_bad_member_is_named_and_nothing_is_published(
    split: Path, make_model: Callable[[Path], Any], tmp_path: Path, mode: str, value: str
) -> None:
    tensor = shardq.plan(split).checkpoint.tensors[K]
    with (split / tensor.shard).open("r+b") as f:
        f.seek(tensor.begin + 2 * 128)
        f.write(torch.tensor([float(value)]).bfloat16().view(torch.uint8).numpy().tobytes())
    out = tmp_path / "out"
    source = open_folder(str(split)) if mode == "folder" else make_model(split).open()
    with pytest.raises(NonFiniteWeight, match=K.replace(".", r"\.")) as refused:
        run(source, out, mode == "stream")
    assert refused.value.exit_code == NonFiniteWeight.exit_code
    assert {p.name for p in out.iterdir()} == {".shardq"}


def test_source_is_eaten_only_when_nothing_needs_it(split: Path, tmp_path: Path) -> None:
    expected = local(split, tmp_path / "local")
    limits, out = Limits(parallel=1, delete_source=True), tmp_path / "out"
    files = sorted(p.name for p in split.glob("*.safetensors"))
    copy = Path(shutil.copytree(split, tmp_path / "copy" / split.name))
    unlink, deleted = Path.unlink, []

    def stop(path: Path, missing_ok: bool = False) -> None:
        if path.parent == copy:
            if deleted:
                raise KeyboardInterrupt
            deleted.append(path.name)
        unlink(path, missing_ok)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "unlink", stop)
        with pytest.raises(KeyboardInterrupt):
            shardq.quantize(copy, "NVFP4A16", output_dir=out, limits=limits)
    assert sorted(p.name for p in copy.glob("*.safetensors")) == [f for f in files if f not in deleted]
    shardq.quantize(copy, "NVFP4A16", output_dir=out, limits=limits)
    assert shards(out) == expected
    assert list(copy.glob("*.safetensors")) == []
    assert shardq.quantize(copy, "NVFP4A16", output_dir=out, limits=limits).already_done


def test_magnitudes_are_measured_once(split: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a resumed run takes them from its journal."""
    ran: list[object] = []
    work = Worker.run

    def note(worker: Worker, what: object) -> Any:
        ran.append(what)
        return work(worker, what)

    monkeypatch.setattr(Worker, "run", note)
    out, tasks = tmp_path / "out", shardq.plan(split, "NVFP4A16").tasks
    for report in (stop_after(len(tasks) // 2), None):
        try:
            shardq.quantize(split, "NVFP4A16", output_dir=out, limits=Limits(parallel=1), report=report)
        except KeyboardInterrupt:
            events = [json.loads(line[9:]) for line in (out / ".shardq" / "journal.jsonl").read_text().splitlines()]
            assert sum(e["event"] == "amax" for e in events) > 3
    surveys = [(w.tensor, w.begin) for w in ran if type(w).__name__ == "SurveyTask"]
    assert len(surveys) == len(set(surveys))
    assert {n for n, _ in surveys} == set(shardq.plan(split, "NVFP4A16").reaches)
    amax = {m.task.amax for w in ran if isinstance(w, Bundle) for m in w.members if hasattr(m.task, "amax")}
    assert len(amax) > 5


def test_file_waits_for_a_partner_that_is_not_even_begun(
    tmp_path: Path, write_moe: WriteMoe, make_model: Callable[[Path], Any], short_spans: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """What was read ahead is believed only when its own shard was right."""
    folder = write_moe(tmp_path / "source" / "model", SPREADS["two"])
    first = sum(t.shard.startswith("model-00001") for t in shardq.plan(folder, "NVFP4A16").tasks)
    take_next, begun, waited, done = Admission.next, list[str](), 0, 0

    def late(admission: Admission) -> ShardCost | None:
        nonlocal waited
        waited += done >= first
        if begun and waited < 5:
            return None
        cost = take_next(admission)
        begun.extend([cost.name] if cost else [])
        return cost

    def report(step: Progress) -> None:
        nonlocal done
        done += step.stage == "work"
        assert step.stage != "file" or len(begun) == 2

    monkeypatch.setattr(Admission, "next", late)
    run(make_model(folder).open(), tmp_path / "out", report=report)
    assert waited >= 5
    assert shards(tmp_path / "out") == local(folder, tmp_path / "local")
