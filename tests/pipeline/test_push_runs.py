"""Whole runs that end in a repo on a Hub (on loopback): one commit shows everything, the disk stays under its cap."""

import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from stopped_runs import stop_after

import shardq
from shardq import Limits
from shardq.errors import BadOption, HubAccess, OutputOccupied, RecipeChanged
from shardq.needs import disk_bytes
from shardq.onepass import OnePass

MakeCheckpoint = Callable[..., Path]
Host = Callable[[Path], str]
REPO = "me/quantized"
EMPTY = {".gitattributes"}
ONE = Limits(parallel=1)
KEEP = Limits(parallel=1, keep_local=True)
LAYERS = 4
STATUS, LOST = "status", "lose_reply"


@pytest.fixture
def folder(make_checkpoint: MakeCheckpoint) -> Path:
    return make_checkpoint(layers=LAYERS)


@pytest.fixture
def source(folder: Path, host_model: Host) -> str:
    return host_model(folder)


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def pushed(hub: Any, branch: str = "main") -> dict[str, bytes]:
    """The files of the repo, without the one that every repo has."""
    return {name: data for name, data in hub.files(REPO, branch).items() if name not in EMPTY}


def made_locally(source: str | Path, tmp_path: Path) -> dict[str, bytes]:
    shardq.quantize(source, output_dir=tmp_path / "local", limits=ONE)
    return bytes_of(tmp_path / "local")


def fetched(hub: Any) -> list[str]:
    """Shards that were asked for as a whole, in order; a request for a part is one for a header."""
    hashes = (s.path.removeprefix("/store/").partition("?")[0] for s in hub.seen("/store/") if s.range is None)
    return [names[h] for names in [shard_names(hub)] for h in hashes if h in names]


def shard_names(hub: Any) -> dict[str, str]:
    """The source's shards by hash."""
    tree = hub.files("org/model")
    return {hashlib.sha256(data).hexdigest(): name for name, data in tree.items() if name.endswith(".safetensors")}


def uploaded(out: Path) -> set[str]:
    """What a journal says of an unfinished run."""
    lines = (out / ".shardq" / "journal.jsonl").read_text().splitlines()
    return {e["file"] for line in lines if (e := json.loads(line.partition(" ")[2]))["event"] == "uploaded"}


def puts(hub: Any) -> list[str]:
    """Hashes of what was sent to storage, in order."""
    return [s.path.removeprefix("/put/").partition("?")[0] for s in hub.seen("/put/", "PUT")]


def interrupt(source: str | Path, out: Path, uploads: int, limits: Limits = ONE) -> None:
    with pytest.raises(KeyboardInterrupt):
        shardq.quantize(source, output_dir=out, limits=limits, push_to=REPO, report=stop_after(uploads, "upload"))


class DiskWatch(threading.Thread):
    """Polls the bytes on the disk below a folder."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.peak_bytes = 0
        self.polls = 0
        self._folder, self._over = folder, threading.Event()

    def run(self) -> None:
        while not self._over.wait(0.0005):
            self.polls += 1
            paths = [os.path.join(top, name) for top, _, names in os.walk(self._folder) for name in names]
            self.peak_bytes = max(self.peak_bytes, sum(map(_disk_bytes, paths)))

    def end(self) -> None:
        self._over.set()
        self.join()


def _disk_bytes(path: str) -> int:
    try:
        return os.stat(path).st_blocks * 512
    except FileNotFoundError:
        return 0


# --- disk ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("remote", "stream", "parallel"),
    [(True, False, 2), (True, True, 1), (False, False, 1)],
    ids=["fetched", "streamed", "folder"],
)
def test_source_eight_times_the_disk_cap(
    push_hub: Any, make_checkpoint: MakeCheckpoint, host_model: Host, tmp_path: Path, remote: bool, stream: bool,
    parallel: int,
) -> None:  # fmt: skip
    folder = make_checkpoint(hidden=256, layers=12)
    source = host_model(folder) if remote else folder
    expected = made_locally(source, tmp_path)
    source_bytes = sum(p.stat().st_size for p in folder.glob("*.safetensors"))
    cap_bytes = source_bytes // 8
    out = tmp_path / "out"
    visible: list[set[str]] = []
    watch = DiskWatch(out)
    watch.start()
    limits = Limits(parallel=parallel, max_disk_bytes=cap_bytes, stream=stream)
    result = shardq.quantize(
        source, output_dir=out, limits=limits, push_to=REPO, report=lambda _: visible.append(set(push_hub.files(REPO)))
    )
    watch.end()
    assert 0 < watch.peak_bytes <= cap_bytes
    assert watch.peak_bytes > (source_bytes // 12 if remote and not stream else result.output_bytes // 12)
    assert watch.polls > 100
    assert len(visible) > 24
    assert all(names == EMPTY for names in visible)
    assert [c.oid for c in push_hub.commits] == [result.pushed_commit]
    assert pushed(push_hub) == expected
    assert not out.exists()
    assert shardq.verify(REPO, deep=True, source=folder).problems == ()


def test_disk_stays_under_the_cap_in_a_run_that_is_taken_up(
    push_hub: Any, make_checkpoint: MakeCheckpoint, host_model: Host, tmp_path: Path, writable_hub_module: ModuleType
) -> None:
    source = host_model(make_checkpoint(hidden=256, layers=6))
    expected = made_locally(source, tmp_path)
    cap_bytes = disk_bytes(OnePass((shardq.plan(source),)), staged=True, uploads=True) + 64_000
    out, limits = tmp_path / "out", Limits(parallel=1, max_disk_bytes=cap_bytes)
    for uploads in (1, 2):  # the upload that follows hangs, so sealed files are left
        push_hub.write_faults = [writable_hub_module.WriteFault(STATUS, "/put/", skip=uploads, times=2)]
        interrupt(source, out, uploads, limits)
    watch = DiskWatch(out)
    watch.start()
    shardq.quantize(source, output_dir=out, limits=limits, push_to=REPO)
    watch.end()
    assert 0 < watch.peak_bytes <= cap_bytes
    assert pushed(push_hub) == expected
    assert len(push_hub.commits) == 1


# --- what is there already -------------------------------------------------------------------------------------------


def test_second_run_answers_that_it_is_done(push_hub: Any, source: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = shardq.quantize(source, output_dir=out, limits=ONE, push_to=REPO)
    push_hub.log.clear()
    again = shardq.quantize(source, output_dir=out, limits=ONE, push_to=REPO)
    assert (first.already_done, again.already_done) == (False, True)
    assert again.pushed_commit == first.pushed_commit
    assert (fetched(push_hub), puts(push_hub)) == ([], [])
    assert not out.exists()


def test_repo_without_config_is_not_done(push_hub: Any, source: str, tmp_path: Path) -> None:
    shardq.quantize(source, output_dir=tmp_path / "out", limits=ONE, push_to=REPO)
    whole = pushed(push_hub)
    repo = push_hub.repos[REPO]
    repo.commit({n: d for n, d in push_hub.files(REPO).items() if n != "config.json"})
    assert not shardq.quantize(source, output_dir=tmp_path / "out", limits=ONE, push_to=REPO).already_done
    assert pushed(push_hub) == whole


def test_kept_output_is_complete_on_both_sides(push_hub: Any, source: str, folder: Path, tmp_path: Path) -> None:
    expected = made_locally(source, tmp_path)
    out = tmp_path / "out"
    first = shardq.quantize(source, output_dir=out, limits=KEEP, push_to=REPO)
    assert bytes_of(out) == expected == pushed(push_hub)
    assert shardq.verify(out, deep=True, source=folder).problems == ()
    push_hub.log.clear()
    again = shardq.quantize(source, output_dir=out, limits=KEEP, push_to=REPO)
    assert again.already_done
    assert (fetched(push_hub), puts(push_hub)) == ([], [])
    shutil.rmtree(out)
    assert shardq.quantize(source, output_dir=out, limits=ONE, push_to=REPO).already_done
    assert not out.exists()
    assert not shardq.quantize(source, output_dir=out, limits=KEEP, push_to=REPO).already_done
    assert bytes_of(out) == expected == pushed(push_hub)
    assert puts(push_hub) == []
    assert [c.oid for c in push_hub.commits] == [first.pushed_commit]


def test_finished_folder_is_only_uploaded(push_hub: Any, source: str, tmp_path: Path) -> None:
    expected = made_locally(source, tmp_path)
    push_hub.log.clear()
    result = shardq.quantize(source, output_dir=tmp_path / "local", limits=ONE, push_to=REPO)
    assert result.already_done
    assert fetched(push_hub) == []
    assert bytes_of(tmp_path / "local") == expected == pushed(push_hub)
    assert [(c.oid, c.message) for c in push_hub.commits] == [(result.pushed_commit, f"W4A16 of {source}")]


def test_finished_folder_that_has_eaten_its_source_is_uploaded(push_hub: Any, folder: Path, tmp_path: Path) -> None:
    out, eating = tmp_path / "out", Limits(parallel=1, delete_source=True)
    shardq.quantize(folder, output_dir=out, limits=eating)
    result = shardq.quantize(folder, output_dir=out, limits=replace(eating, keep_local=True), push_to=REPO)
    assert result.already_done
    assert result.pushed_to == REPO
    assert [c.oid for c in push_hub.commits] == [result.pushed_commit]
    assert bytes_of(out) == pushed(push_hub)


def test_finished_folder_that_lacks_a_small_file_is_refused(push_hub: Any, source: str, tmp_path: Path) -> None:
    made_locally(source, tmp_path)
    (tmp_path / "local" / "README.md").unlink()
    with pytest.raises(shardq.errors.SourceUnreadable, match=r"README\.md"):
        shardq.quantize(source, output_dir=tmp_path / "local", limits=ONE, push_to=REPO)
    assert push_hub.commits == []


def test_new_recipe_replaces_the_old_output(
    push_hub: Any, make_checkpoint: MakeCheckpoint, host_model: Host, tmp_path: Path
) -> None:
    shardq.quantize(host_model(make_checkpoint(layers=3)), output_dir=tmp_path / "a", limits=ONE, push_to=REPO)
    old = set(pushed(push_hub))
    source = host_model(make_checkpoint(layers=2))
    shardq.quantize(source, "W8A16", output_dir=tmp_path / "b", limits=ONE, push_to=REPO)
    assert len(push_hub.commits) == 2
    shardq.quantize(source, "W8A16", output_dir=tmp_path / "local", limits=ONE)
    assert pushed(push_hub) == bytes_of(tmp_path / "local")
    assert old - set(pushed(push_hub)) == {f"model-{n:05d}-of-00003.safetensors" for n in (1, 2, 3)}


def test_restart_to_equal_bytes_makes_no_second_commit(push_hub: Any, source: str, tmp_path: Path) -> None:
    first = shardq.quantize(source, output_dir=tmp_path / "out", limits=ONE, push_to=REPO)
    push_hub.log.clear()
    again = shardq.quantize(source, output_dir=tmp_path / "out", limits=ONE, push_to=REPO, restart=True)
    assert not again.already_done
    assert len(fetched(push_hub)) == LAYERS
    assert (again.pushed_commit, len(push_hub.commits)) == (first.pushed_commit, 1)


def test_repo_does_not_answer_for_weights_that_changed_since(push_hub: Any, folder: Path, tmp_path: Path) -> None:
    shardq.quantize(folder, output_dir=tmp_path / "out", limits=ONE, push_to=REPO)
    shard = min(folder.glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-4] ^= 1  # the header, and so the identity, stays
    shard.write_bytes(data)
    with pytest.raises(RecipeChanged, match="was written after it"):
        shardq.quantize(folder, output_dir=tmp_path / "out", limits=ONE, push_to=REPO)
    shardq.quantize(folder, output_dir=tmp_path / "out", limits=ONE, push_to=REPO, restart=True)
    assert len(push_hub.commits) == 2
    assert pushed(push_hub) == made_locally(folder, tmp_path)


def test_branch_is_made_and_main_is_left_alone(push_hub: Any, source: str, tmp_path: Path) -> None:
    expected = made_locally(source, tmp_path)
    result = shardq.quantize(source, output_dir=tmp_path / "out", limits=ONE, push_to=REPO, branch="int4")
    assert pushed(push_hub, "int4") == expected
    assert set(push_hub.files(REPO)) == EMPTY
    assert (result.pushed_to, len(push_hub.commits)) == (f"{REPO}@int4", 1)
    assert shardq.verify(f"{REPO}@int4").problems == ()


def test_private_repo_is_made(push_hub: Any, source: str, tmp_path: Path) -> None:
    shardq.quantize(source, output_dir=tmp_path / "out", limits=ONE, push_to=REPO, private=True)
    assert push_hub.repos[REPO].access == "private"
    assert shardq.verify(REPO).problems == ()


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "files",
    [
        {"config.json": b"{}"},
        {"pytorch_model.bin": b"weights"},
        {"model.safetensors": b"weights", "shardq.json": b'{"files": {}, "license": "of another program"}'},
        {"model.safetensors": b"weights", "shardq.json": b'{"identity": {}, "files": ["model.safetensors"]}'},
    ],
    ids=["config", "weights", "strange record", "damaged record"],
)
def test_repo_of_somebody_else_is_refused(
    push_hub: Any, source: str, tmp_path: Path, files: Mapping[str, bytes]
) -> None:
    push_hub.add_repo(REPO)
    push_hub.edit(REPO, files)
    with pytest.raises(OutputOccupied, match="holds something else") as caught:
        shardq.quantize(source, output_dir=tmp_path / "out", limits=ONE, push_to=REPO)
    assert "\n" not in str(caught.value)
    assert fetched(push_hub) == []
    assert push_hub.commits == []
    assert not (tmp_path / "out").exists()


def test_eating_the_source_needs_the_local_output(push_hub: Any, folder: Path, tmp_path: Path) -> None:
    before = bytes_of(folder)
    eating = Limits(parallel=1, delete_source=True)
    with pytest.raises(BadOption, match="only copy of the weights"):
        shardq.quantize(folder, output_dir=tmp_path / "out", limits=eating, push_to=REPO)
    assert bytes_of(folder) == before
    assert push_hub.log == []
    shardq.quantize(folder, output_dir=tmp_path / "out", limits=replace(eating, keep_local=True), push_to=REPO)
    assert not list(folder.glob("*.safetensors"))
    assert bytes_of(tmp_path / "out") == pushed(push_hub)


def test_working_folder_of_another_recipe_is_left_alone(push_hub: Any, source: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shardq.quantize(source, output_dir=out, limits=ONE, push_to=REPO)
    with pytest.raises(KeyboardInterrupt):
        shardq.quantize(source, "W8A16", output_dir=out, limits=ONE, push_to="me/other", report=stop_after(1, "upload"))
    before = bytes_of(out)
    assert shardq.quantize(source, output_dir=out, limits=ONE, push_to=REPO).already_done
    assert bytes_of(out).keys() == before.keys()
    with pytest.raises(RecipeChanged):
        shardq.quantize(source, "W2A16", output_dir=out, limits=ONE, push_to="me/other")


# --- taking up an interrupted run ----------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True], ids=["fetched", "streamed"])
def test_journal_alone_resumes_on_another_machine(push_hub: Any, source: str, tmp_path: Path, stream: bool) -> None:
    expected = made_locally(source, tmp_path)
    limits = replace(ONE, stream=stream)
    interrupt(source, tmp_path / "here", 2, limits)
    there = tmp_path / "there" / ".shardq" / "journal.jsonl"
    there.parent.mkdir(parents=True)
    shutil.copy(tmp_path / "here" / ".shardq" / "journal.jsonl", there)
    done = uploaded(tmp_path / "there")
    sent = puts(push_hub)
    push_hub.log.clear()
    shardq.quantize(source, output_dir=tmp_path / "there", limits=limits, push_to=REPO)
    names = shard_names(push_hub).values()
    assert len(done) == 2
    assert {shard_names(push_hub)[h] for h in weights_asked(push_hub)} == {*names} - done
    assert not {*sent[:2]} & {*puts(push_hub)}
    assert pushed(push_hub) == expected
    assert len(push_hub.commits) == 1
    assert not (tmp_path / "there").exists()


def weights_asked(hub: Any) -> set[str]:
    """Hashes of shards of which more than the header was asked for."""
    beyond = [s for s in hub.seen("/store/") if s.range is None or s.begin > 0]
    return {s.path.removeprefix("/store/").partition("?")[0] for s in beyond} & shard_names(hub).keys()


@pytest.mark.parametrize("kept", [False, True], ids=["made again", "sent again"])
def test_uploads_that_the_server_has_dropped_come_again(push_hub: Any, source: str, tmp_path: Path, kept: bool) -> None:
    expected = made_locally(source, tmp_path)
    out, limits = tmp_path / "out", replace(ONE, keep_local=kept)
    interrupt(source, out, 2, limits)
    sent, done = puts(push_hub)[:2], uploaded(out)
    push_hub.collect_garbage()
    push_hub.log.clear()
    shardq.quantize(source, output_dir=out, limits=limits, push_to=REPO)
    assert {*sent} <= {*puts(push_hub)}
    assert done & {*fetched(push_hub)} == (set() if kept else done)
    assert pushed(push_hub) == expected
    assert len(push_hub.commits) == 1


def test_local_output_asked_for_later_is_complete(push_hub: Any, source: str, tmp_path: Path) -> None:
    expected = made_locally(source, tmp_path)
    interrupt(source, tmp_path / "out", 2)
    shardq.quantize(source, output_dir=tmp_path / "out", limits=KEEP, push_to=REPO)
    assert bytes_of(tmp_path / "out") == expected == pushed(push_hub)
    assert len(push_hub.commits) == 1


def test_push_given_up_later_leaves_a_complete_folder(push_hub: Any, source: str, tmp_path: Path) -> None:
    expected = made_locally(source, tmp_path)
    interrupt(source, tmp_path / "out", 2)
    shardq.quantize(source, output_dir=tmp_path / "out", limits=ONE)
    assert bytes_of(tmp_path / "out") == expected
    assert push_hub.commits == []


def test_another_repo_gets_everything(push_hub: Any, source: str, tmp_path: Path) -> None:
    interrupt(source, tmp_path / "out", 2)
    push_hub.collect_garbage()
    shardq.quantize(source, output_dir=tmp_path / "out", limits=ONE, push_to="me/other")
    assert set(push_hub.files(REPO)) == EMPTY
    assert shardq.verify("me/other", deep=True).problems == ()


# --- faults --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "path", "method"),
    [
        (LOST, "/commit/", "POST"),
        (STATUS, "/commit/", "POST"),
        (STATUS, "objects/batch", "POST"),
        (LOST, "objects/batch", "POST"),
        (STATUS, "/put/", "PUT"),
        (LOST, "/put/", "PUT"),
        ("drop_put", "/put/", "PUT"),
        (STATUS, "/verify", "POST"),
    ],
)
def test_fault_costs_no_second_commit(
    push_hub: Any, source: str, tmp_path: Path, writable_hub_module: ModuleType, kind: str, path: str, method: str
) -> None:
    expected = made_locally(source, tmp_path)
    fault = writable_hub_module.WriteFault(kind, path, method, at=10_000, skip=0 if path == "/commit/" else 2)
    push_hub.write_faults.append(fault)
    result = shardq.quantize(source, output_dir=tmp_path / "out", limits=ONE, push_to=REPO)
    assert fault.times == 0
    assert [c.oid for c in push_hub.commits] == [result.pushed_commit]
    assert pushed(push_hub) == expected


def test_upload_that_is_refused_ends_the_run_and_loses_nothing(
    push_hub: Any, source: str, tmp_path: Path, writable_hub_module: ModuleType
) -> None:
    expected = made_locally(source, tmp_path)
    out = tmp_path / "out"
    push_hub.write_faults.append(writable_hub_module.WriteFault(STATUS, "objects/batch", skip=2, times=99, status=403))
    with pytest.raises(HubAccess) as caught:
        shardq.quantize(source, output_dir=out, limits=ONE, push_to=REPO)
    assert "403" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert set(push_hub.files(REPO)) == EMPTY
    sealed = {p.name for p in (out / ".shardq" / "ready").iterdir()}
    done = uploaded(out)
    assert (len(done), len(sealed) > 0, sealed & done) == (1, True, set())
    push_hub.write_faults.clear()
    push_hub.log.clear()
    shardq.quantize(source, output_dir=out, limits=ONE, push_to=REPO)
    assert not {*fetched(push_hub)} & (sealed | done)
    assert pushed(push_hub) == expected
    assert len(push_hub.commits) == 1


def test_upload_dropped_before_the_commit_is_made_again_by_the_next_run(
    push_hub: Any, source: str, tmp_path: Path
) -> None:
    expected = made_locally(source, tmp_path)
    push_hub.before_commit = push_hub.collect_garbage
    with pytest.raises(HubAccess, match="does not exist"):
        shardq.quantize(source, output_dir=tmp_path / "out", limits=ONE, push_to=REPO)
    assert push_hub.commits == []
    shardq.quantize(source, output_dir=tmp_path / "out", limits=ONE, push_to=REPO)
    assert pushed(push_hub) == expected
    assert len(push_hub.commits) == 1
