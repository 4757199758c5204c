"""GGUF files of shards that come from a Hub (on loopback), fetched or streamed, and of files that go there."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from stopped_runs import stop_after

import shardq
from shardq import Limits, Progress
from shardq.destinations.hub import HubDestination
from shardq.errors import BudgetTooSmall, ChecksumMismatch
from shardq.files.gguf_read import read_gguf
from shardq.gguf.model_files import needed_texts
from shardq.headers import read_checkpoint
from shardq.journal import Journal
from shardq.needs import disk_bytes
from shardq.onepass import OnePass
from shardq.plans import make_plan
from shardq.run import quantize_to_folder
from shardq.worker import Worker

pytest.importorskip("gguf", reason="names of GGUF tensors come from the package gguf")
pytest.importorskip("tokenizers", reason="vocabularies are read with the package tokenizers")
import encoded_streams as streams
import gguf_sources as made

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
@pytest.mark.parametrize("name", made.TINY)
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


# --- under a cap, and to a Hub ---------------------------------------------------------------------------------------


def least(model: Any, recipe: shardq.Recipe, mode: str, push: bool) -> int:
    """The smallest --max-disk, from what is known before the run."""
    work = OnePass((plan_of(model, recipe),))
    return disk_bytes(work, staged=mode == "fetch", uploads=push, streamed=mode == "stream")


def plan_of(model: Any, recipe: shardq.Recipe) -> shardq.Plan:
    opened = model.open()
    return make_plan(needed_texts(read_checkpoint(opened), opened, [recipe]), recipe)


def pushed(model: Any) -> dict[str, bytes]:
    """The files of the repo, without the one that every repo has."""
    return {name: data for name, data in model.hub.files(TARGET).items() if name != ".gitattributes"}


@pytest.mark.parametrize("push", [False, True], ids=["kept", "pushed"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("part_bytes", [None, 2_500_000], ids=["one file", "parts"])
def test_the_least_cap_that_is_accepted_is_kept(
    tmp_path: Path, make_model: MakeModel, measures: ModuleType, part_bytes: int | None, mode: str, push: bool
) -> None:
    """The file's first tensor is in the last shard; with parts, the others are made and sent long before."""
    source, recipe = made.write("large", tmp_path), made.recipe("large", part_bytes)
    model, out = make_model(source), tmp_path / "out"
    cap = least(model, recipe, mode, push)
    model.forget()
    with pytest.raises(BudgetTooSmall, match="--max-disk"):
        run(model, recipe, out, mode, cap=cap - 1, push=push)
    assert [model.asked(shard)[1:] for shard in model.shards] == [[]] * len(model.shards)  # headers alone
    with measures.Meter(out) as meter:
        run(model, recipe, out, mode, meter.look, cap, push)
    assert meter.samples > 20
    assert cap * 0.8 < meter.peak_bytes <= cap
    run(model, recipe, tmp_path / "free", mode)
    assert (pushed(model) if push else folder(out)) == folder(tmp_path / "free")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["fp8", "mxfp4"])
def test_shards_that_others_read_stay_within_the_least_cap(
    tmp_path: Path, make_model: MakeModel, measures: ModuleType, short_spans: int, name: str, mode: str
) -> None:
    """Scales come with the first shard and are read until the third is done."""
    source, recipe = made.write(name, tmp_path), made.recipe(name, PARTS[1])
    model, out = make_model(source), tmp_path / "out"
    cap = least(model, recipe, mode, push=True)
    for is_stopped in (True, False):
        with measures.Meter(out) as meter:
            try:
                run(model, recipe, out, mode, stop_after(1, "upload") if is_stopped else meter.look, cap, push=True)
            except KeyboardInterrupt:
                assert is_stopped
        assert meter.peak_bytes <= cap
    run(model, recipe, tmp_path / "free", mode)
    assert pushed(model) == folder(tmp_path / "free")


def puts(model: Any) -> list[str]:
    """Hashes of what was sent to storage as a whole."""
    whole = (s for s in model.hub.seen("/put/", "PUT") if s.status == 200)
    return [s.path.removeprefix("/put/").partition("?")[0] for s in whole]


@pytest.mark.parametrize("mode", MODES)
def test_parts_that_an_interrupted_run_left_stay_under_the_cap(
    tmp_path: Path, make_model: MakeModel, measures: ModuleType, mode: str
) -> None:
    """All of them are on the disk when the next run begins, and are counted then."""
    source, recipe = made.write("large", tmp_path), made.recipe("large", 2_500_000)
    model, out = make_model(source), tmp_path / "out"
    cap = least(model, recipe, mode, push=False)
    run(model, recipe, tmp_path / "free", mode)
    with pytest.raises(KeyboardInterrupt):
        run(model, recipe, out, mode, stop_when(lambda: len(settled(out)) == 2), cap)
    with measures.Meter(out) as meter:
        run(model, recipe, out, mode, meter.look, cap)
    assert meter.peak_bytes <= cap
    assert folder(out) == folder(tmp_path / "free")


@pytest.mark.parametrize("mode", MODES)
def test_parts_are_sent_as_they_are_made_and_appear_with_one_commit(
    tmp_path: Path, make_model: MakeModel, short_spans: int, mode: str
) -> None:
    source, recipe = made.write("rotary", tmp_path), made.recipe("rotary", PARTS[1])
    model, out = make_model(source), tmp_path / "out"
    run(model, recipe, tmp_path / "kept", mode)
    parts = len(list((tmp_path / "kept").glob("*.gguf")))
    for uploads in (1, 3, parts - 4):
        with pytest.raises(KeyboardInterrupt):
            run(model, recipe, out, mode, stop_after(uploads, "upload"), push=True)
        assert pushed(model) == {}
    run(model, recipe, out, mode, push=True)
    assert len(puts(model)) == len(set(puts(model))) == parts
    assert pushed(model) == folder(tmp_path / "kept")
    assert len(model.hub.commits) == 1
    assert not out.exists()
    model.forget()
    seen: list[Progress] = []
    run(model, recipe, out, mode, seen.append, push=True)
    assert seen == []
    assert (puts(model), len(model.hub.commits)) == ([], 1)
    assert "config.json" not in pushed(model)


def test_parts_that_the_server_forgets_are_made_of_their_shards_again(
    tmp_path: Path, make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Settled ones, too; also when the run that begins them anew is stopped."""
    source, recipe = made.write("smallest", tmp_path), made.recipe("smallest", 22_000)
    model, out = make_model(source), tmp_path / "out"
    run(model, recipe, tmp_path / "kept")
    with pytest.raises(KeyboardInterrupt):
        run(model, recipe, out, report=stop_when(lambda: bool(settled(out))), push=True)
    first = settled(out)
    assert len(first) == 1
    model.hub.collect_garbage()
    with pytest.raises(KeyboardInterrupt):
        run(model, recipe, out, report=stop_after(1, "upload"), push=True)
    model.hub.collect_garbage()
    run(model, recipe, out, push=True)
    assert pushed(model) == folder(tmp_path / "kept")
