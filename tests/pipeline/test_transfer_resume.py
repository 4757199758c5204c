"""A run from a Hub that stopped in the middle, for any reason, goes on where it was: in either mode, from either mode,
and from the same revision of the repo."""

import errno
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shardq import Progress
from shardq.errors import DiskFull, RecipeChanged
from shardq.sources.base import Source

HERE = Path(__file__).parent
SHARDS = tuple(f"model-{n:05d}-of-00003.safetensors" for n in (1, 2, 3))
LIMIT_S = 60.0  # for anything that takes a second on an idle machine
MODES = ("file", "stream")

Contents = Callable[[Path], dict[str, str]]


def check_nothing_loads(out: Path) -> None:
    assert {p.name for p in out.iterdir()} == {".shardq"}


def words_of(model: Any, out: Path, mode: str) -> list[str]:
    words = ["quantize", model.repo, "-o", str(out), "--parallel", "1"]
    return [*words, "--stream"] if mode == "stream" else words


# --- interrupted, and run again -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("first", "second"), [(a, b) for a in MODES for b in MODES])
def test_killed_in_a_download_and_run_again(
    model: Any, usual: Any, tmp_path: Path, contents: Contents,
    journal_lines: Callable[[Path, str], int], first: str, second: str, short_spans: int,
) -> None:  # fmt: skip
    out, work = tmp_path / "out", tmp_path / "out" / ".shardq"
    slow = model.store(SHARDS[2])
    if first == "file":
        model.add_fault("trickle", slow, at=100_000, rate_bytes_s=100_000.0, skip=1)
    else:
        model.add_fault("trickle", slow, at=10_000, rate_bytes_s=2_000.0, skip=5)

    def part_bytes() -> int:
        return sum(p.stat().st_size for p in (work / "src").glob(f"{SHARDS[2]}.*.part"))

    def in_the_middle() -> bool:
        begun = part_bytes() > 150_000 if first == "file" else model.hub.faults[0].times == 0
        return journal_lines(out, "sealed") == 2 and begun

    others = model.hub.connections()
    model.kill_when(in_the_middle, words_of(model, out, first), tmp_path, short_spans)
    check_nothing_loads(out)
    here = part_bytes()
    model.hub.faults.clear()
    model.hub.wait_until_left(others)  # else a request that is read late counts as one of the next run
    model.forget()

    model.run(model.open(), out, second)
    assert contents(out) == usual.contents
    assert [len(model.asked(shard)) for shard in SHARDS[:2]] == [0, 0]  # sealed: not even a byte
    again = model.asked(SHARDS[2])
    assert again[0].begin == (here if (first, second) == ("file", "file") else 0)
    assert model.sent()[SHARDS[2]] == usual.sent[second][SHARDS[2]] - again[0].begin


@pytest.mark.parametrize("second", MODES)
def test_a_staged_shard_is_not_asked_for_again(
    model: Any, source: Source, usual: Any, tmp_path: Path, contents: Contents, second: str
) -> None:
    out = tmp_path / "out"

    def stop(step: Progress) -> None:
        if step.stage == "work":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model.run(source, out, "file", stop)
    staged = {p.name for p in (out / ".shardq" / "src").glob("*.safetensors")}
    assert staged
    model.forget()
    model.run(source, out, second)
    assert contents(out) == usual.contents
    assert [shard for shard in staged if model.asked(shard)] == []


def test_a_streamed_shard_begins_again_and_a_sealed_one_does_not(
    model: Any, source: Source, usual: Any, tmp_path: Path, contents: Contents
) -> None:
    """The hash of a streamed shard is taken over all of it, so nothing made of a part of it is kept."""
    out = tmp_path / "out"

    def stop(step: Progress) -> None:
        if step.done_files == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model.run(source, out, "stream", stop)
    sealed = {p.name for p in (out / ".shardq" / "ready").iterdir()}
    assert len(sealed) == 1
    model.forget()
    model.run(source, out, "stream")
    assert contents(out) == usual.contents
    assert {shard for shard in SHARDS if not model.asked(shard)} == sealed
    for shard in set(SHARDS) - sealed:
        assert model.sent()[shard] == usual.sent["stream"][shard]


@pytest.mark.parametrize("mode", MODES)
def test_a_run_that_waits_for_a_silent_server_can_be_stopped(
    model: Any, usual: Any, tmp_path: Path, contents: Contents, mode: str
) -> None:
    out = tmp_path / "out"
    model.add_fault("stall", model.store(SHARDS[1]), at=30_000, skip=1)
    begun_s = 0.0

    def stop(step: Progress) -> None:
        nonlocal begun_s
        if step.stage == "fetch" and step.done_files == 2:
            begun_s = time.monotonic()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model.run(model.open(timeout_s=60.0), out, mode, stop)
    assert time.monotonic() - begun_s < 5
    check_nothing_loads(out)
    model.run(model.open(), out, mode)
    assert contents(out) == usual.contents


# --- full disks -----------------------------------------------------------------------------------------------------


def test_disk_full_in_a_download(
    model: Any, source: Source, usual: Any, tmp_path: Path, contents: Contents, monkeypatch: pytest.MonkeyPatch
) -> None:
    from shardq.files.atomic import pwrite_all

    def refuse(fd: int, data: Any, offset: int) -> None:
        if offset + len(data) > 200_000:
            pwrite_all(fd, data[: max(0, 200_000 - offset)], offset)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        pwrite_all(fd, data, offset)

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr("shardq.files.direct.pwrite_all", refuse)
        patch.setattr("shardq.sources.hub_sinks.PIECE_BYTES", 50_000)
        with pytest.raises(DiskFull, match=r"\.part: No space left"):
            model.run(source, out, "file")
    check_nothing_loads(out)
    parts = {p.name.partition(".safetensors")[0] + ".safetensors": p.stat().st_size
             for p in (out / ".shardq" / "src").glob("*.part")}  # fmt: skip
    assert 200_000 in parts.values()
    model.forget()
    model.run(source, out, "file")
    assert contents(out) == usual.contents
    assert {shard: model.asked(shard)[0].begin for shard in parts} == parts


@pytest.mark.parametrize("mode", MODES)
def test_disk_full_before_an_output_file(
    model: Any, source: Source, usual: Any, tmp_path: Path, contents: Contents, monkeypatch: pytest.MonkeyPatch,
    journal_lines: Callable[[Path, str], int], mode: str,
) -> None:  # fmt: skip
    from shardq.files.atomic import preallocate

    begun: list[str] = []

    def refuse(fd: int, size_bytes: int, path: str) -> None:
        begun.append(path)
        if len(begun) == 3:
            raise DiskFull(f"cannot write {path}: No space left on device")
        preallocate(fd, size_bytes, path)

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr("shardq.staging.preallocate", refuse)
        with pytest.raises(DiskFull):
            model.run(source, out, mode)
    check_nothing_loads(out)
    sealed = {p.name for p in (out / ".shardq" / "ready").iterdir()}
    staged = {p.name for p in (out / ".shardq" / "src").glob("*.safetensors")}
    assert journal_lines(out, "sealed") == len(sealed)
    model.forget()
    model.run(source, out, mode)
    assert contents(out) == usual.contents
    assert {shard for shard in SHARDS if not model.asked(shard)} == sealed | staged


@pytest.mark.parametrize(
    ("mode", "code", "reason"), [("file", 33, "cannot write"), ("stream", 35, "a piece of memory")]
)
def test_limit_of_file_size(
    model: Any, source: Source, usual: Any, tmp_path: Path, contents: Contents, mode: str, code: int, reason: str
) -> None:
    out = tmp_path / "out"
    done = subprocess.run(
        [sys.executable, "-P", str(HERE / "limited_cli.py"), *words_of(model, out, mode)],
        env=model.environment(tmp_path, "FILE_LIMIT_BYTES", 400_000),
        cwd=tmp_path,
        check=False,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    assert done.returncode == code, done.stderr
    assert reason in done.stderr
    assert "Traceback" not in done.stderr
    check_nothing_loads(out)
    model.run(source, out, mode)
    assert contents(out) == usual.contents


# --- a repo that changes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_a_branch_that_moves_on_does_not_mix_revisions(
    model: Any, source: Source, usual: Any, tmp_path: Path, contents: Contents, mode: str
) -> None:
    def move(step: Progress) -> None:
        if step.done_files == 1 and len(model.hub.repos[model.repo].commits) == 1:
            model.hub.repos[model.repo].commit({**model.files, SHARDS[2]: model.files[SHARDS[1]], "config.json": b"{}"})

    model.run(source, tmp_path / "out", mode, move)
    assert len(model.hub.repos[model.repo].commits) == 2
    assert contents(tmp_path / "out") == usual.contents
    revisions = {match[1] for s in model.hub.log if (match := re.search(r"/(?:resolve|tree)/([^/?]+)", s.path))}
    assert revisions == {source.commit}


@pytest.mark.parametrize("mode", MODES)
def test_a_run_is_not_finished_from_another_revision(
    model: Any, source: Source, usual: Any, tmp_path: Path, contents: Contents, mode: str
) -> None:
    out = tmp_path / "out"

    def stop(step: Progress) -> None:
        if step.done_files == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model.run(source, out, mode, stop)
    model.hub.repos[model.repo].commit({**model.files, "generation_config.json": b"{}"})
    with pytest.raises(RecipeChanged, match=r"source\.commit"):
        model.run(model.open(), out, mode)
    model.run(model.open(source.commit), out, mode)
    assert contents(out) == usual.contents
