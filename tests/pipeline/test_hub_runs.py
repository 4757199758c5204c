"""Whole runs from a Hub (on loopback), and runs that eat their source folder."""

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import shardq
from shardq import Limits, Progress, make_recipe
from shardq.errors import CheckpointIncomplete, ChecksumMismatch
from shardq.run import Result, quantize_to_folder
from shardq.sources.base import Source
from shardq.sources.hub import open_hub

MakeCheckpoint = Callable[..., Path]
Contents = Callable[[Path], dict[str, str]]
LAYERS = 6
LIMIT_S = 30.0  # for anything that takes milliseconds on an idle machine
OF_THE_SOURCE = {"README.md", "shardq.json", "shardq-ledger.json.zst"}  # they name the source and its commit


@pytest.fixture
def folder(make_checkpoint: MakeCheckpoint) -> Path:
    return make_checkpoint(layers=LAYERS)


@pytest.fixture
def repo(hub: Any, folder: Path, fake_hub_module: Any) -> Source:
    """The folder as a repo, opened at its main branch, which then moves on."""
    repo = fake_hub_module.Repo()
    files = {p.name: p.read_bytes() for p in folder.iterdir()}
    repo.commit(files)
    hub.repos["org/model"] = repo
    source = open_hub("org/model", endpoint=hub.url)
    repo.commit({"config.json": b"{}", "other.safetensors": b"x"})
    return source


def quantize(source: Source, out: Path, limits: Limits, report: Callable[[Progress], None]) -> Result:
    return quantize_to_folder(source, make_recipe("W4A16"), out, limits, False, report)


def shards(source: Source) -> set[str]:
    return {f.name for f in source.files() if f.name.endswith(".safetensors")}


def staged(out: Path) -> set[str]:
    """Source shards in the working folder, whole or on their way."""
    return {p.name.partition(".safetensors")[0] + ".safetensors" for p in (out / ".shardq" / "src").glob("*")}


def downloaded(hub: Any, repo: Source) -> list[str]:
    """Shards that were asked for as a whole, in order; a request for a part is one for a header."""
    names = {f.sha256: f.name for f in repo.files()}
    found = [s for s in hub.seen("/store/") if s.range is None or s.begin > 0]
    hashes = [s.path.removeprefix("/store/").partition("?")[0] for s in found]
    return [names[h] for h in hashes if names[h] in shards(repo)]


def silent(_: Progress) -> None:
    pass


@pytest.mark.parametrize("parallel", [1, 2])
def test_hub_run_writes_what_a_local_run_writes(
    repo: Source, folder: Path, tmp_path: Path, contents: Contents, one: Limits, parallel: int
) -> None:
    quantize(repo, tmp_path / "out", Limits(parallel=parallel), silent)
    shardq.quantize(folder, output_dir=tmp_path / "local", limits=one)
    here, there = contents(tmp_path / "local"), contents(tmp_path / "out")
    assert here.keys() == there.keys()
    assert {n for n in here if here[n] != there[n]} == OF_THE_SOURCE
    identity = json.loads((tmp_path / "out" / "shardq.json").read_text())["identity"]
    assert identity["source.commit"] == repo.commit
    assert "org/model" in (tmp_path / "out" / "README.md").read_text()
    assert shardq.verify(tmp_path / "out", deep=True, source=folder).problems == ()


def test_shards_are_staged_one_after_the_other_and_no_byte_comes_twice(
    hub: Any, repo: Source, tmp_path: Path, one: Limits
) -> None:
    out = tmp_path / "out"
    peak, seen, over = 0, set(), threading.Event()

    def watch() -> None:
        nonlocal peak
        while not over.wait(0.0005):
            now = staged(out)
            peak = max(peak, len(now))
            seen.update(now)

    watcher = threading.Thread(target=watch)
    watcher.start()
    ends: list[set[str]] = []
    quantize(repo, out, one, lambda step: ends.append(staged(out)) if step.stage == "file" else None)
    over.set()
    watcher.join()
    assert len(seen) == LAYERS
    assert 1 <= peak <= 3
    assert ends[-1] == set()
    assert not (tmp_path / "hub_cache").exists()
    assert sorted(downloaded(hub, repo)) == sorted(seen)
    resolved = hub.seen("/resolve/")
    assert {s.path.split("/resolve/")[1].split("/")[0] for s in resolved} == {repo.commit}


def test_resume_fetches_no_shard_again(hub: Any, repo: Source, folder: Path, tmp_path: Path, one: Limits) -> None:
    out = tmp_path / "out"
    work = out / ".shardq"

    def stop(step: Progress) -> None:
        if step.done_files == 2:
            deadline_s = time.monotonic() + LIMIT_S
            while not list((work / "src").glob("*.safetensors")):
                assert time.monotonic() < deadline_s, "nothing is fetched ahead"
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(repo, out, one, stop)
    here = {p.name for folder in ("src", "ready") for p in (work / folder).glob("*.safetensors")}
    hub.log.clear()
    most = 0

    def count(_: Progress) -> None:
        nonlocal most
        most = max(most, len(staged(out)))

    quantize(repo, out, one, count)
    assert most <= 3
    assert len(here) >= 3
    assert {*downloaded(hub, repo)} <= shards(repo) - here  # a part that is complete needs no request
    assert shardq.verify(out, deep=True, source=folder).problems == ()


def test_corrupt_download_is_refused_and_leaves_nothing_loadable(
    hub: Any, repo: Source, tmp_path: Path, fake_hub_module: Any, one: Limits
) -> None:
    out = tmp_path / "out"
    hub.faults.append(fake_hub_module.Fault("corrupt", "/store/", times=100, at=5000, skip=LAYERS))
    with pytest.raises(ChecksumMismatch, match="sha256"):
        quantize(repo, out, one, silent)
    assert {p.name for p in out.iterdir()} == {".shardq"}
    hub.faults.clear()
    quantize(repo, out, one, silent)
    assert shardq.verify(out, deep=True).problems == ()


def test_dropped_connections_cost_nothing_but_time(
    hub: Any, repo: Source, tmp_path: Path, fake_hub_module: Any, one: Limits
) -> None:
    hub.faults.append(fake_hub_module.Fault("drop", "/store/", times=3, at=30_000, skip=LAYERS))
    quantize(repo, tmp_path / "out", one, silent)
    assert hub.faults[0].times == 0
    assert shardq.verify(tmp_path / "out", deep=True).problems == ()


def test_command_line_finds_the_repo_by_its_name(hub: Any, repo: Source, tmp_path: Path) -> None:
    settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "NO_PROXY": "127.0.0.1"}
    command = [sys.executable, "-P", "-m", "shardq.cli", "quantize", f"org/model@{repo.commit}", "--parallel", "2"]
    env = {**os.environ, **settings}
    done = subprocess.run(command, env=env, cwd=tmp_path, check=False, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert shardq.verify(tmp_path / "model-W4A16", deep=True).problems == ()
    assert not list((tmp_path / "home").rglob("*.safetensors"))


# --- a source folder that is eaten up -------------------------------------------------------------------------------


def test_source_shards_stay_unless_asked(folder: Path, tmp_path: Path, contents: Contents, one: Limits) -> None:
    before = contents(folder)
    shardq.quantize(folder, output_dir=tmp_path / "out", limits=one)
    assert contents(folder) == before


def test_delete_source_frees_each_shard_once_its_output_is_durable(
    folder: Path, tmp_path: Path, contents: Contents, one: Limits
) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy" / folder.name))
    shardq.quantize(folder, output_dir=tmp_path / "kept", limits=one)
    out = tmp_path / "out"
    left: list[tuple[int, int]] = []

    def report(step: Progress) -> None:
        if step.stage == "file":
            left.append((step.done_files, len(list(copy.glob("*.safetensors")))))

    limits = Limits(parallel=1, delete_source=True)
    shardq.quantize(copy, output_dir=out, limits=limits, report=report)
    assert left == [(n, LAYERS - n) for n in range(1, LAYERS + 1)]
    assert contents(out) == contents(tmp_path / "kept")
    assert {p.name for p in copy.iterdir()} == {"config.json", "tokenizer.json", "model.safetensors.index.json"}
    again = shardq.quantize(copy, output_dir=out, limits=limits)
    assert again.already_done
    assert (again.quantized, again.copied) == (7 * LAYERS, LAYERS + 3)
    assert again.output_bytes == sum(p.stat().st_size for p in out.glob("*.safetensors"))
    with pytest.raises(CheckpointIncomplete):
        shardq.quantize(copy, "W8A16", output_dir=out, limits=limits)
    with pytest.raises(CheckpointIncomplete):
        shardq.quantize(copy, output_dir=out, limits=limits, restart=True)
    assert shardq.verify(out, deep=True).problems == ()


def test_restart_of_a_half_eaten_source_is_refused_and_keeps_what_is_done(
    folder: Path, tmp_path: Path, contents: Contents, one: Limits
) -> None:
    shardq.quantize(folder, output_dir=tmp_path / "kept", limits=one)
    limits = Limits(parallel=1, delete_source=True)

    def stop(step: Progress) -> None:
        if step.done_files == 2:
            raise KeyboardInterrupt

    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        shardq.quantize(folder, output_dir=out, limits=limits, report=stop)
    with pytest.raises(CheckpointIncomplete):
        shardq.quantize(folder, output_dir=out, limits=limits, restart=True)
    shardq.quantize(folder, output_dir=out, limits=limits)
    assert contents(out) == contents(tmp_path / "kept")
