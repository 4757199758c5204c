"""GGUF files of shards that come from a Hub (on loopback), fetched or streamed, and of files that go there."""

import importlib
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import shardq
from shardq import Limits, Progress
from shardq.destinations.hub import HubDestination
from shardq.errors import BudgetTooSmall, ChecksumMismatch
from shardq.files.gguf_read import read_gguf
from shardq.journal import Journal
from shardq.needs import disk_bytes
from shardq.onepass import OnePass
from shardq.run import quantize_to_folder
from shardq.worker import Worker

pytest.importorskip("gguf", reason="names of GGUF tensors come from the package gguf")
pytest.importorskip("tokenizers", reason="vocabularies are read with the package tokenizers")
with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(Path(__file__).parent)
    made: Any = importlib.import_module("gguf_sources")
    streams: Any = importlib.import_module("encoded_streams")

PARTS = (None, 64 << 10)  # one file, and several
TARGET = "me/quantized"
MODES = ["fetch", *(["stream"] if sys.platform == "linux" else [])]
ONE = Limits(parallel=1)
Report = Callable[[Progress], None]
MakeModel = Callable[[Path], Any]


class Cut(BaseException):
    """The end of a run that nothing catches."""


@pytest.fixture
def hub(writable_hub_module: ModuleType, push_hub: Any) -> Any:
    """For `make_model`: one that takes uploads, too."""
    return push_hub


def run(
    model: Any, recipe: shardq.Recipe, out: Path, mode: str = "fetch", report: Report = lambda _: None,
    cap: int | None = None, push: bool = False,
) -> None:  # fmt: skip
    limits = Limits(parallel=1, stream=mode == "stream", max_disk_bytes=cap)
    destination = HubDestination(TARGET, endpoint=model.hub.url) if push else None
    quantize_to_folder(model.open(), recipe, out, limits, False, report, destination)


def tensors(out: Path) -> list[bytes]:
    """What is in the files behind their metadata, which names the source: that of a folder and of a repo differ."""
    found = sorted(out.glob("*.gguf"))
    return [path.read_bytes()[read_gguf(path).header_bytes_len :] for path in found]


def local(source: Path, recipe: shardq.Recipe, out: Path) -> list[bytes]:
    """As a run of the folder makes them."""
    shardq.quantize(source, recipe, output_dir=out, limits=ONE)
    return tensors(out)


def folder(out: Path) -> dict[str, bytes]:
    assert not (out / ".shardq").exists()
    return {p.name: p.read_bytes() for p in out.iterdir()}


def settled(out: Path) -> list[str]:
    journal, found = Journal.open(out / ".shardq" / "journal.jsonl")
    journal.close()
    return [e["shard"] for e in found if e["event"] == "settled"]


def stop_when(condition: Callable[[], bool]) -> Report:
    def report(_: Progress) -> None:
        if condition():
            raise KeyboardInterrupt

    return report


# --- from a Hub ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("part_bytes", PARTS, ids=["one file", "parts"])
@pytest.mark.parametrize("name", made.SOURCES)
def test_resumed_run_asks_for_nothing_that_is_settled(
    tmp_path: Path, make_model: MakeModel, short_spans: int, name: str, part_bytes: int | None, mode: str
) -> None:
    source, recipe = made.write(name, tmp_path), made.recipe(name, part_bytes)
    model, out = make_model(source), tmp_path / "out"
    run(model, recipe, tmp_path / "whole", mode)
    done: list[str] = []
    for count in (1, 2):
        try:
            run(model, recipe, out, mode, stop_when(lambda count=count: len(settled(out)) >= count))
        except KeyboardInterrupt:
            done = settled(out)
        model.forget()
    run(model, recipe, out, mode)
    assert done or part_bytes
    assert [model.asked(shard) for shard in done] == [[]] * len(done)
    assert folder(out) == folder(tmp_path / "whole")
    assert tensors(out) == local(source, recipe, tmp_path / "local")


@pytest.mark.parametrize("mode", MODES)
def test_a_file_that_is_only_to_be_sealed_needs_no_shard(
    tmp_path: Path, make_model: MakeModel, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    """Cut while the file is hashed: only the last shard is not settled, and still there if it was fetched."""
    source, recipe = made.write("rotary", tmp_path), made.recipe("rotary")
    model, out = make_model(source), tmp_path / "out"
    run(model, recipe, tmp_path / "whole", mode)

    def cut(_worker: Worker, _task: Any) -> Any:
        raise Cut

    with monkeypatch.context() as inner:
        inner.setattr(Worker, "_seal", cut)
        with pytest.raises(Cut):
            run(model, recipe, out, mode)
    done = settled(out)
    model.forget()
    run(model, recipe, out, mode)
    assert len(done) >= len(model.shards) - 1
    again = set(model.shards) - set(done) if mode == "stream" else set()
    assert {shard for shard in model.shards if model.asked(shard)} == again
    assert folder(out) == folder(tmp_path / "whole")


@pytest.mark.skipif("stream" not in MODES, reason="memory without a name is there on Linux only")
@pytest.mark.parametrize("name", ["rotary", "fp8", "mxfp4"])
def test_shard_that_comes_wrong_once_is_done_again(
    tmp_path: Path, make_model: MakeModel, monkeypatch: pytest.MonkeyPatch, short_spans: int, name: str
) -> None:
    source, recipe = made.write(name, tmp_path), made.recipe(name, PARTS[1])
    model = make_model(source)
    run(model, recipe, tmp_path / "whole", "stream")
    for shard in model.shards:
        size = len(model.files[shard])
        with monkeypatch.context() as inner:
            streams.corrupt_span(inner, shard, size - 100)
            model.forget()
            run(model, recipe, tmp_path / shard, "stream")
        assert model.sent()[shard] > 1.5 * size
        assert folder(tmp_path / shard) == folder(tmp_path / "whole")


@pytest.mark.skipif("stream" not in MODES, reason="memory without a name is there on Linux only")
def test_nothing_is_settled_that_was_made_of_a_wrong_loan(
    tmp_path: Path, make_model: MakeModel, monkeypatch: pytest.MonkeyPatch, short_spans: int
) -> None:
    source, recipe = made.write("fp8", tmp_path), made.recipe("fp8")
    model, out = make_model(source), tmp_path / "out"
    run(model, recipe, tmp_path / "whole", "stream")
    loans = [loan for own in OnePass((shardq.plan(source, recipe),)).loans.values() for loan in own]
    with monkeypatch.context() as inner:
        flip = streams.Flip(inner, loans[-1], loans[-1].ranges[0].begin, 1)
        with pytest.raises(ChecksumMismatch, match="came otherwise than when it was read for"):
            run(model, recipe, out, "stream")
    assert flip.done
    assert loans[-1].home not in settled(out)
    run(model, recipe, out, "stream")
    assert folder(out) == folder(tmp_path / "whole")


def test_shard_without_a_place_in_the_file_is_never_asked_for(tmp_path: Path, make_model: MakeModel) -> None:
    """Layers for multi-token prediction that llama.cpp does not know; and one tensor among others that it does."""
    source = made.write("without a place", tmp_path)
    recipe = made.recipe("without a place")
    plan = shardq.plan(source, recipe)
    written = {t.shard for t in plan.tasks if t.files}
    model = make_model(source)
    assert set(model.shards) - written == {"model-00003-of-00003.safetensors"}
    assert any(d.action == "drop" and d.tensor.shard in written for d in plan.decisions)
    for mode in MODES:
        model.forget()
        run(model, recipe, tmp_path / mode, mode)
        assert {shard for shard in model.shards if model.asked(shard)} == written
        assert tensors(tmp_path / mode) == local(source, recipe, tmp_path / f"{mode}-local")
