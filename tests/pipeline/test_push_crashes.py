"""Killed at any moment, a run that uploads is finished by the same command: exactly one commit, the one that a run
without a kill makes, and nothing that the journal calls uploaded is sent again."""

import itertools
import json
import os
import random
import re
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import shardq
from shardq import Limits
from shardq.staging import Staging

LIMIT_S = 60.0  # for anything that takes a second on an idle machine
REPO = "me/quantized"
ONE = Limits(parallel=1)
LAYERS = 4
# Requests at whose arrival a run is killed: (what, how many pass before, done all the same)
MOMENTS = [
    (r"^GET /store/", 2, True),
    (r"^GET /store/", LAYERS + 2, True),  # a shard on its way; before that come headers
    (r"^POST .*objects/batch", 0, True),  # the look at the right to write
    (r"^POST .*objects/batch", 1, False),
    (r"^POST .*objects/batch", 2, True),
    (r"^POST .*objects/batch", LAYERS, True),
    *((r"^PUT /put/", skip, act) for skip in range(LAYERS + 1) for act in (True, False)),
    (r"^POST .*/verify", 0, True),
    (r"^POST .*/verify", LAYERS - 1, True),
    (r"^POST .*/preupload/", 0, True),
    *((r"^POST .*/commit/", 0, act) for act in (True, False)),
]
GGUF_MOMENTS = [
    (r"^GET /store/", LAYERS + 2, True),
    *((r"^PUT /put/", skip, act) for skip, act in ((0, True), (2, False), (3, True))),
    (r"^POST .*/commit/", 0, True),
]
ANY_TIME = ("at no request, but after a random time", 0, True)
NEVER = ("at no request", 0, True)
RANDOM_KILLS = 4
WAYS = [(), ("--stream",), ("--keep-local",)]  # to run, taking turns
Begin = Callable[..., Any]  # of conftest.py
Lines = Callable[[Path, str], int]


@pytest.fixture
def source(make_checkpoint: Callable[..., Path], host_model: Callable[[Path], str]) -> str:
    return host_model(make_checkpoint(layers=LAYERS))


@pytest.fixture
def expected(source: str, tmp_path: Path) -> dict[str, bytes]:
    """What the repo holds after a run that nothing disturbs: what such a run leaves in a folder."""
    out = tmp_path / "undisturbed"
    shardq.quantize(source, output_dir=out, limits=ONE)
    return files_of(out)


def files_of(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def pushed(hub: Any) -> dict[str, bytes]:
    """The files of the repo, without the one that every repo has."""
    return {name: data for name, data in hub.files(REPO).items() if name != ".gitattributes"}


class Tripwire(list[Any]):
    """A hub's log that kills a run when a certain request arrives."""

    def __init__(self, moment: tuple[str, int, bool]) -> None:
        super().__init__()
        self.tripped = False
        self.kill: Callable[[], object] = bool  # does nothing
        self._pattern, self._skip, self._act = moment

    def has_begun(self) -> bool:
        """True once a run has asked whether it may write, the last thing before it begins to work."""
        return any("objects/batch" in s.path for s in list(self))

    def append(self, seen: Any) -> None:
        super().append(seen)
        if self.tripped or not re.search(self._pattern, f"{seen.method} {seen.path}"):
            return
        self._skip -= 1
        if self._skip < 0:
            self.tripped = True
            self.kill()
            if not self._act:  # the server, too, forgets about it
                raise ConnectionAbortedError


def journaled(out: Path) -> set[str]:
    """Hashes of the files that the journal calls uploaded."""
    hashes: dict[str, str] = {}
    found: set[str] = set()
    try:
        text = (out / ".shardq" / "journal.jsonl").read_text()
    except FileNotFoundError:
        return found
    for line in text.splitlines(keepends=True):
        if not line.endswith("\n"):
            break  # torn
        event = json.loads(line.partition(" ")[2])
        if event["event"] == "sealed":
            hashes[event["file"]] = event["sha256"]
        elif event["event"] == "uploaded":
            found.add(hashes[event["file"]])
    return found


def puts(hub: Any) -> Counter[str]:
    """How often each content arrived in storage as a whole."""
    whole = (s for s in hub.seen("/put/", "PUT") if s.status == 200)
    return Counter(s.path.removeprefix("/put/").partition("?")[0] for s in whole)


@dataclass(frozen=True)
class Kills:
    """Runs of one kind that are killed at each of some moments, until each has come."""

    hub: Any
    source: str
    words: tuple[str, ...]  # options that say what to make
    expected: dict[str, bytes]
    moments: Sequence[tuple[str, int, bool]]
    ways: Sequence[tuple[str, ...]]  # to run, taking turns

    def play(self, folder: Path, begin: Begin) -> Counter[tuple[str, int, bool]]:
        """The moments, and how often a run was killed there."""
        chance = random.Random(8)
        moments = list(self.moments)
        chance.shuffle(moments)
        killed: Counter[tuple[str, int, bool]] = Counter()
        ways = itertools.cycle(self.ways)
        while moments:
            out, way = folder / f"out{killed.total()}", next(ways)
            self.hub.repos.pop(REPO, None)
            self.hub.commits.clear()
            self.hub.objects.clear()
            sent: Counter[str] = Counter()
            stored: set[str] = set()  # as the journal said after the last kill
            while True:  # run, kill, run, kill, ... until one run gets through
                moment = moments.pop() if moments else NEVER
                wire = self.hub.log = Tripwire(moment)
                slow_s = 0.01 if moment is ANY_TIME else 0.0
                process = begin(self.source, out, slow_s, "--push-to", REPO, "--parallel", "1", *self.words, *way)
                wire.kill = process.kill_group
                if moment is ANY_TIME and process.wait_for(wire.has_begun):
                    time.sleep(chance.uniform(0, 0.4))
                    process.kill_group()
                code = process.wait(LIMIT_S)
                assert not puts(self.hub).keys() & stored
                sent += puts(self.hub)
                stored = journaled(out)
                assert len(self.hub.commits) <= 1
                if code == 0:
                    if moment is not NEVER:  # too little was left to do: try it with a run from the start
                        moments.append(moment)
                    break
                assert code == -signal.SIGKILL, process.communicate()[1]
                killed[moment] += 1
                assert self.hub.commits or REPO not in self.hub.repos or pushed(self.hub) == {}
            assert pushed(self.hub) == self.expected
            assert len(self.hub.commits) == 1
            assert way == ("--keep-local",) or not out.exists()
            assert set(sent.values()) == {1}
            assert files_of(out) == (self.expected if way == ("--keep-local",) else {})
        return killed


@pytest.mark.slow
def test_kill_at_any_moment_leaves_one_commit(
    push_hub: Any, source: str, expected: dict[str, bytes], tmp_path: Path, begin: Begin
) -> None:
    moments = [*MOMENTS, *[ANY_TIME] * RANDOM_KILLS]
    killed = Kills(push_hub, source, (), expected, moments, WAYS).play(tmp_path, begin)
    assert killed.keys() >= {*MOMENTS}
    assert killed.total() >= 25


@pytest.mark.slow
def test_kill_of_a_run_that_makes_parts_of_a_gguf_file(
    push_hub: Any, host_model: Callable[[Path], str], tmp_path: Path, begin: Begin
) -> None:
    """Of which most are sent before the last shard comes."""
    pytest.importorskip("gguf", reason="names of GGUF tensors come from the package gguf")
    pytest.importorskip("tokenizers", reason="vocabularies are read with the package tokenizers")
    import gguf_sources as made

    source, recipe = host_model(made.write("rotary", tmp_path / "source")), made.recipe("rotary", 64 << 10)
    shardq.quantize(source, recipe, output_dir=tmp_path / "undisturbed", limits=ONE)
    words = ("--scheme", "gguf:q4_k_m", "--tokenizer-pre", recipe.gguf.tokenizer_pre, "--split-max-size", "65536B")
    kills = Kills(push_hub, source, words, files_of(tmp_path / "undisturbed"), GGUF_MOMENTS, WAYS[:2])
    assert kills.play(tmp_path, begin).keys() >= {*GGUF_MOMENTS}


@pytest.mark.parametrize(
    ("path", "skip"), [("/put/", 1), ("/commit/", 0), ("/preupload/", 0)], ids=["upload", "commit", "small files"]
)
def test_signal_stops_an_upload_in_order(
    push_hub: Any, source: str, expected: dict[str, bytes], tmp_path: Path, begin: Begin,
    writable_hub_module: ModuleType, path: str, skip: int,
) -> None:  # fmt: skip
    out = tmp_path / "out"
    stall = writable_hub_module.WriteFault("stall", path, at=20_000 if path == "/put/" else 10, skip=skip)
    push_hub.write_faults.append(stall)
    process = begin(source, out, 0, "--push-to", REPO, "--parallel", "1")
    assert process.wait_for(lambda: stall.times == 0)
    time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, messages = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 143
    assert "run the same command again to resume" in messages
    assert "Traceback" not in messages
    assert push_hub.commits == []
    done = journaled(out)
    push_hub.log.clear()
    result = shardq.quantize(source, output_dir=out, limits=ONE, push_to=REPO)
    assert not puts(push_hub).keys() & done
    assert [c.oid for c in push_hub.commits] == [result.pushed_commit]
    assert pushed(push_hub) == expected


def test_signal_stops_the_upload_of_a_finished_folder(
    push_hub: Any, source: str, expected: dict[str, bytes], tmp_path: Path, begin: Begin,
    writable_hub_module: ModuleType,
) -> None:  # fmt: skip
    out = tmp_path / "undisturbed"
    stall = writable_hub_module.WriteFault("stall", "/put/", at=20_000, skip=1)
    push_hub.write_faults.append(stall)
    process = begin(source, out, 0, "--push-to", REPO, "--parallel", "1")
    assert process.wait_for(lambda: stall.times == 0)
    process.send_signal(signal.SIGTERM)
    _, messages = process.communicate(timeout=LIMIT_S)
    assert (process.returncode, push_hub.commits) == (143, [])
    assert "run the same command again to resume" in messages
    shardq.quantize(source, output_dir=out, limits=ONE, push_to=REPO)
    assert set(puts(push_hub).values()) == {1}
    assert pushed(push_hub) == expected
    assert len(push_hub.commits) == 1


class Cut(BaseException):
    """The end of a run that nothing catches."""


@pytest.mark.parametrize("at", ["before", "journal gone", "files gone", "after"])
def test_cut_between_commit_and_cleanup(
    push_hub: Any, source: str, expected: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    out = tmp_path / "out"

    def cut(staging: Staging) -> None:
        if at in ("journal gone", "files gone"):
            staging.journal.unlink()
        if at == "files gone":
            shutil.rmtree(staging.ready)
        if at == "after":
            staging.remove()
        raise Cut

    with monkeypatch.context() as patch:
        patch.setattr(Staging, "abandon", cut)
        with pytest.raises(Cut):
            shardq.quantize(source, output_dir=out, limits=ONE, push_to=REPO)
    assert out.exists()
    assert len(push_hub.commits) == 1
    push_hub.log.clear()
    again = shardq.quantize(source, output_dir=out, limits=ONE, push_to=REPO)
    assert again.already_done
    assert again.pushed_commit == push_hub.commits[0].oid
    assert not out.exists()
    assert puts(push_hub) == {}
    assert not push_hub.seen("/commit/", "POST")
    assert pushed(push_hub) == expected


@pytest.mark.parametrize("name", ["model-00001-of-00004.safetensors", "shardq.json", "config.json"])
def test_cut_between_commit_and_kept_output(
    push_hub: Any, source: str, expected: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    out, limits = tmp_path / "out", Limits(parallel=1, keep_local=True)
    plain = os.replace

    def cut(path: Path, target: Path) -> None:
        if Path(target) == out / name:
            raise Cut
        plain(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", cut)
        with pytest.raises(Cut):
            shardq.quantize(source, output_dir=out, limits=limits, push_to=REPO)
    assert not (out / "config.json").exists()
    assert pushed(push_hub) == expected
    push_hub.log.clear()
    shardq.quantize(source, output_dir=out, limits=limits, push_to=REPO)
    assert files_of(out) == expected
    assert puts(push_hub) == {}
    assert len(push_hub.commits) == 1
