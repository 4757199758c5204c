"""Four workers of one job, eight of them killed: the output is that of one machine, and each file appears once."""

import importlib
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import shardq
from shardq import Limits

with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(Path(__file__).parent)
    processes: Any = importlib.import_module("job_workers")

KILLS = 8
ONE = Limits(parallel=1)
Contents = Callable[[Path], dict[str, str]]


def check_killed(
    source: Path, words: list[str], expected: dict[str, str], tmp_path: Path, contents: Contents, slow_s: float
) -> None:
    job = tmp_path / "job"
    watch = processes.Watch(job)
    watch.start()
    began_s = time.monotonic()
    with processes.Workers(job, [str(source), *words], slow_s) as workers:
        for number in range(4):
            workers.start("--worker", f"{number}/4")
        killed = workers.kill_some(KILLS, random.Random(5), job / "complete.json", (0.5, 1.0))
        workers.finish()
    watch.end()
    print(f"{killed} kills, {time.monotonic() - began_s:.1f} s")
    assert killed == KILLS, "the job was complete before all kills: make it slower"
    assert contents(job / "output") == expected
    published = {name: len(inodes) for name, inodes in watch.seen.items()}
    assert published == dict.fromkeys((n for n in expected if n.endswith((".safetensors", ".gguf"))), 1)
    assert not (job / "work").exists()


def test_integers(make_checkpoint: Callable[..., Path], tmp_path: Path, contents: Contents) -> None:
    source = make_checkpoint(layers=12)
    shardq.quantize(source, output_dir=tmp_path / "alone", limits=ONE)
    check_killed(source, ["--scheme", "W4A16"], contents(tmp_path / "alone"), tmp_path, contents, 0.1)
