"""Batches against a Hub on loopback: what is made, what is left alone, what is tried again, and how a run ends."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import pytest

import shardq
from shardq.batch.driver import Row, Silence, judge_rows, plan_batch, run_batch
from shardq.batch.manifest import Entry, Model, read_manifest
from shardq.batch.state import Standing, read_status
from shardq.errors import BatchLocked, BatchOverBudget, BatchPartlyFailed, BatchUnfinished, ShardqError
from shardq.lock import FolderLock

LIMIT_S = 60.0  # for anything that takes seconds on an idle machine
BUDGET = "[budget]\nparallel = 1\n"
QUICK = '[retry]\nattempts = 2\nfirst_wait = "0.1s"\n'
Host = Callable[..., str]


class Told(Silence):
    """Takes down what a batch tells."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.ends: list[tuple[str, str]] = []
        self.waited_s: list[float] = []

    def begins(self, model: Model, entries: Sequence[Entry]) -> None:
        self.begun.append(model.source)

    def ended(self, entry: Entry, standing: Standing) -> None:
        self.ends.append((entry.label, standing.error.type if standing.error else standing.state))

    def waits(self, wait_s: float) -> None:
        self.waited_s.append(wait_s)


@pytest.fixture
def small_model(make_checkpoint: Callable[..., Path]) -> dict[str, bytes]:
    """Two shards."""
    return {p.name: p.read_bytes() for p in make_checkpoint(layers=2, mlp=False).iterdir()}


@pytest.fixture
def host(push_hub: Any, writable_hub_module: ModuleType, small_model: dict[str, bytes]) -> Host:
    """host(name, flip=0): a commit of org/name; `flip` changes weights."""

    def make(name: str, flip: int = 0) -> str:
        repo = push_hub.repos.setdefault(f"org/{name}", writable_hub_module.Repo())
        files = dict(small_model)
        shard = next(n for n in sorted(files) if n.endswith(".safetensors"))
        weights = bytearray(files[shard])
        weights[-2] ^= flip
        return str(repo.commit({**files, shard: bytes(weights)}))

    return make


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str], Path]:
    def put(text: str) -> Path:
        path = tmp_path / "nightly.toml"
        path.write_text(text)
        return path

    return put


def run(path: Path, once: bool = False) -> tuple[list[Row], ShardqError | None, Told]:
    told = Told()
    rows = run_batch(read_manifest(path), once, told)
    return rows, judge_rows(rows), told


def states(rows: Sequence[Row]) -> dict[str, str]:
    return {r.entry.label: r.standing.error.type if r.standing.error else r.standing.state for r in rows}


def reads(hub: Any) -> int:
    """Of shards, which are so small that a look at the header is the whole file."""
    return sum(s.sent_bytes > 100_000 for s in hub.seen("^/store/"))


def command(path: Path, *words: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "shardq.cli", "batch", str(path), *words],
        text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def test_one_read_makes_what_is_out_of_date_and_nothing_else(
    push_hub: Any, host: Host, write: Callable[[str], Path], tmp_path: Path
) -> None:
    first = host("a")
    text = (
        '[recipes.big]\nscheme = "W8A16"\n[defaults]\npush_to = "me/{name}-{recipe}"\nrecipes = ["MXFP4", "big"]\n'
        f'{BUDGET}[[model]]\nsource = "org/a"\n[[model]]\nsource = "org/b"\npush_to = "me/b"\nrecipes = ["W4A16"]\n'
    )
    host("b")
    path = write(text)
    assert [r.look.why for r in plan_batch(read_manifest(path))] == ["nothing is there yet"] * 3
    assert not (tmp_path / "nightly.batch").exists()
    rows, error, told = run(path)
    assert error is None
    assert states(rows) == dict.fromkeys(("me/a-MXFP4", "me/a-big", "me/b"), "done")
    assert reads(push_hub) == 2 * 4  # of two sources two shards, each for its header and once more for all
    assert {r.standing.commit for r in rows[:2]} == {first}
    assert json.loads(push_hub.files("me/a-big")["shardq.json"])["identity"]["source.commit"] == first

    push_hub.log.clear()
    second = host("a", flip=1)
    path = write(text.replace('scheme = "W8A16"', 'scheme = "W8A16"\nignore = ["re:.*o_proj"]'))
    planned = plan_batch(read_manifest(path))
    assert [r.look.done for r in planned] == [False, False, True]
    rows, error, told = run(path)
    assert error is None
    assert told.begun == ["org/a"]
    assert reads(push_hub) == 4
    assert [c.repo for c in push_hub.commits].count("me/a-MXFP4") == 2
    assert {r.standing.commit for r in rows[:2]} == {second}

    path = write(text)  # the recipe as it was before, of the new commit
    planned = plan_batch(read_manifest(path))
    assert [r.look.why for r in planned] == ["up to date", "the recipe has changed", "up to date"]


def test_what_a_run_killed_while_clearing_up_left_is_cleared_away(
    push_hub: Any, host: Host, write: Callable[[str], Path], tmp_path: Path
) -> None:
    host("a")
    path = write(f'{BUDGET}[[model]]\nsource = "org/a"\npush_to = "me/a"\n')
    run(path)
    place = tmp_path / "nightly.batch" / "work" / "me--a"
    for left in (place, place / ".shardq"):  # killed before the last folder was removed, and before the last but one
        left.mkdir(parents=True)
        assert [r.look.why for r in plan_batch(read_manifest(path))] == [
            "what a stopped run left here is to be cleared away"
        ]
        rows, error, _ = run(path)
        assert error is None
        assert states(rows) == {"me/a": "done"}
        assert not place.exists()
    assert len(push_hub.commits) == 1


def test_a_finished_folder_gives_way_to_a_newer_commit_and_no_other_source(
    push_hub: Any, host: Host, write: Callable[[str], Path], tmp_path: Path
) -> None:
    host("a")
    path = write(f'{BUDGET}{QUICK}[[model]]\nsource = "org/a"\noutput_dir = "out"\n')
    assert run(path)[1] is None
    second = host("a", flip=1)
    assert run(path)[1] is None
    assert json.loads((tmp_path / "out" / "shardq.json").read_text())["identity"]["source.commit"] == second
    assert run(path)[2].begun == []
    before = (tmp_path / "out" / "shardq.json").read_bytes()
    host("b")
    rows, error, _ = run(write(f'{BUDGET}{QUICK}[[model]]\nsource = "org/b"\noutput_dir = "out"\n'))
    assert isinstance(error, BatchPartlyFailed)
    assert states(rows) == {"out": "RecipeChanged"}
    assert (tmp_path / "out" / "shardq.json").read_bytes() == before


def test_failures_keep_nothing_else_from_being_made(push_hub: Any, host: Host, write: Callable[[str], Path]) -> None:
    host("a")
    text = (
        f'{BUDGET}{QUICK}[defaults]\npush_to = "me/{{name}}-{{recipe}}"\n[[model]]\nsource = "org/gone"\n'
        '[[model]]\nsource = "org/a"\n[model.recipes]\nodd = { scheme = "W4A16", group_size = 48 }\n'
        'fine = { scheme = "MXFP4" }\n'
    )
    path = write(text)
    rows, error, _ = run(path)
    assert states(rows) == {"me/gone-W4A16": "HubAccess", "me/a-odd": "BadGroupSize", "me/a-fine": "done"}
    assert isinstance(error, BatchPartlyFailed)
    assert "2 of 3 outputs failed: me/gone-W4A16, me/a-odd" in str(error)
    rows, error, told = run(path)
    assert told.begun == []  # what source and recipe decide is not tried again; the repo that is gone was asked for
    assert states(rows)["me/a-odd"] == "BadGroupSize"
    host("a", flip=1)
    host("gone")
    rows, _, told = run(path)
    assert told.begun == ["org/gone", "org/a"]
    assert states(rows) == {"me/gone-W4A16": "done", "me/a-odd": "BadGroupSize", "me/a-fine": "done"}


def test_what_passes_is_tried_again_later(
    push_hub: Any, writable_hub_module: ModuleType, host: Host, write: Callable[[str], Path]
) -> None:

    def damage(commit: str) -> None:
        """The first shard arrives wrong twice, after its header."""
        files = push_hub.repos["org/a"].commits[commit]
        shard = files[min(n for n in files if n.endswith(".safetensors"))]
        address = f"^/store/{hashlib.sha256(shard).hexdigest()}"
        push_hub.faults[:] = [writable_hub_module.Fault("corrupt", address, at=700, times=2, skip=1)]

    damage(host("a"))
    text = f'{BUDGET}[retry]\nfirst_wait = "%s"\n[[model]]\nsource = "org/a"\npush_to = "me/a"\n'
    rows, error, told = run(write(text % "1h"), once=True)
    assert isinstance(error, BatchUnfinished)
    assert told.ends == [("me/a", "ChecksumMismatch")]
    (standing,) = (r.standing for r in rows)
    assert (standing.state, standing.attempts) == ("waiting", 1)
    assert standing.next_try is not None
    assert 3500 < standing.next_try - time.time() <= 3600
    push_hub.log.clear()
    rows, error, told = run(write(text % "1h"), once=True)
    assert told.begun == []  # not before its time
    assert isinstance(error, BatchUnfinished)
    assert push_hub.seen("^/store/") == []

    damage(host("a", flip=1))  # another commit: at once
    rows, error, told = run(write(text % "0.2s"))
    assert error is None
    assert told.ends == [("me/a", "ChecksumMismatch"), ("me/a", "done")]
    assert len(told.waited_s) == 1


def test_what_does_not_fit_is_told_apart(push_hub: Any, host: Host, write: Callable[[str], Path]) -> None:
    host("a")
    path = write(f'{BUDGET}max_disk = "100k"\n{QUICK}[[model]]\nsource = "org/a"\npush_to = "me/a"\n')
    rows, error, told = run(path)
    assert isinstance(error, BatchOverBudget)
    assert states(rows) == {"me/a": "BudgetTooSmall"}
    assert len(told.ends) == 1


def test_disk_that_others_hold_is_not_given_twice(
    push_hub: Any, host: Host, write: Callable[[str], Path], tmp_path: Path
) -> None:
    host("a")
    left = tmp_path / "nightly.batch" / "work" / "me--gone" / ".shardq"
    left.mkdir(parents=True)
    (left / "rest").write_bytes(b"x" * 10_000_000)
    models = "".join(f'[[model]]\nsource = "org/{n}"\npush_to = "me/{n}"\n' for n in ("gone", "a"))
    rows, _, _ = run(write(f'{BUDGET}max_disk = "10M"\n{QUICK}{models}'))
    trouble = rows[1].standing.error
    assert trouble is not None
    assert trouble.type == "BudgetTooSmall"
    assert "0.0 GB are held by other outputs" in trouble.message


def test_a_second_run_beside_it_ends_at_once(push_hub: Any, host: Host, write: Callable[[str], Path]) -> None:
    host("a")
    path = write(f'{BUDGET}[[model]]\nsource = "org/a"\npush_to = "me/a"\n')
    folder = read_manifest(path).folder
    folder.mkdir()
    with FolderLock(folder / "lock"):
        second = command(path)
        _, told = second.communicate(timeout=LIMIT_S)
    assert second.returncode == BatchLocked.exit_code, told
    assert f"pid {os.getpid()}" in told
    assert push_hub.log == []


def test_stopped_by_a_signal_it_goes_on(push_hub: Any, host: Host, write: Callable[[str], Path]) -> None:
    host("a")
    path = write(f'{BUDGET}[[model]]\nsource = "org/a"\npush_to = "me/a"\n')
    push_hub.write_faults.append(type_of_write_fault(push_hub)("stall", "^/put/"))
    first = command(path)
    wait_for(lambda: bool(push_hub.seen("^/put/", "PUT") or stalled(push_hub)))
    first.send_signal(signal.SIGTERM)
    _, told = first.communicate(timeout=LIMIT_S)
    assert first.returncode == 143, told
    assert read_status(read_manifest(path).folder / "status.json")["me/a"].state == "waiting"
    second = command(path, "--json")
    output, told = second.communicate(timeout=LIMIT_S)
    assert second.returncode == 0, told
    (entry,) = json.loads(output)["entries"]
    assert (entry["state"], entry["attempts"], entry["pushed_commit"]) == ("done", 0, push_hub.commits[0].oid)


def test_a_killed_process_ends_its_model_only(push_hub: Any, host: Host, write: Callable[[str], Path]) -> None:
    host("a")
    host("b")
    models = "".join(f'[[model]]\nsource = "org/{n}"\npush_to = "me/{n}"\n' for n in ("a", "b"))
    path = write(f"{BUDGET}{QUICK}{models}")
    push_hub.write_faults.append(type_of_write_fault(push_hub)("stall", "^/put/"))
    batch = command(path)
    wait_for(lambda: stalled(push_hub))
    errands = [p for p in psutil.Process(batch.pid).children() if "spawn_main" in " ".join(p.cmdline())]
    assert len(errands) == 1
    errands[0].kill()
    _, told = batch.communicate(timeout=LIMIT_S)
    assert batch.returncode == 0, told
    assert "me/a: failed, attempt 1: its process was killed (signal 9)" in told
    assert [c.repo for c in push_hub.commits] == ["me/b", "me/a"]


def type_of_write_fault(hub: Any) -> Any:
    return sys.modules[type(hub).__module__].WriteFault


def stalled(hub: Any) -> bool:
    """True once a request waits that will never be answered."""
    return any(f.kind == "stall" and f.times == 0 for f in hub.write_faults)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline_s, "nothing happens"
        time.sleep(0.01)


def test_collections_have_what_is_published_once(push_hub: Any, host: Host, write: Callable[[str], Path]) -> None:
    host("a")
    push_hub.collections["me/Old ones"] = ["me/other"]
    text = f'{BUDGET}[[model]]\nsource = "org/a"\npush_to = "me/a"\ncollection = "me/%s"\n'
    (row,) = shardq.run_manifest(write(text % "Old ones"))
    assert (row.standing.state, row.standing.collection) == ("done", "me/Old ones")
    assert push_hub.collections == {"me/Old ones": ["me/other", "me/a"]}
    push_hub.log.clear()
    assert run(write(text % "Old ones"))[1] is None
    assert len(push_hub.log) == 2  # nothing about collections
    assert run(write(text % "New ones"))[1] is None
    assert push_hub.collections == {"me/Old ones": ["me/other", "me/a"], "me/New ones": ["me/a"]}
