"""Killed at any moment, a run leaves nothing that looks finished; the same command completes it to the same bytes."""

import os
import random
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

import shardq
from shardq import Limits
from shardq.errors import OutputLocked

LIMIT_S = 60.0  # for anything that takes a second on an idle machine
KILLS = 20
Contents = Callable[[Path], dict[str, str]]
Begin = Callable[..., Any]  # of conftest.py
Lines = Callable[[Path, str], int]


@pytest.mark.slow
def test_kill_of_the_whole_group_at_random_moments(
    checkpoint: Path, tmp_path: Path, begin: Begin, undisturbed: dict[str, str], contents: Contents
) -> None:
    moments_s = random.Random(5)
    kills = rounds = 0
    while kills < KILLS:
        out = tmp_path / f"out{rounds}"
        rounds += 1
        while True:  # run, kill, run, kill, ... until one run gets through
            process = begin(checkpoint, out, 0.01)
            if process.wait_for((out / ".shardq" / "journal.jsonl").exists):
                try:
                    process.wait(moments_s.uniform(0, 0.6) if kills < KILLS else LIMIT_S)
                except subprocess.TimeoutExpired:
                    process.kill_group()
                    kills += 1
                    there = contents(out)
                    assert "config.json" not in there or there.items() >= undisturbed.items()
                    continue
            assert process.wait() == 0, process.communicate()[1]
            break
        assert contents(out) == undisturbed
    assert shardq.verify(out, deep=True, source=checkpoint).problems == ()


def test_killed_worker_costs_its_task_only(
    checkpoint: Path, tmp_path: Path, begin: Begin, undisturbed: dict[str, str], contents: Contents,
    journal_lines: Lines,
) -> None:  # fmt: skip
    out = tmp_path / "out"
    process = begin(checkpoint, out, 0.1)
    run = psutil.Process(process.pid)

    def workers() -> list[psutil.Process]:
        return [p for p in run.children(recursive=True) if p.ppid() != run.pid]

    assert process.wait_for(lambda: journal_lines(out, "task") > 1 and len(workers()) == 2)
    workers()[0].kill()
    _, messages = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 0
    assert "was killed (signal 9)" in messages
    assert contents(out) == undisturbed


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signal_stops_in_order_and_the_same_command_resumes(
    checkpoint: Path, tmp_path: Path, begin: Begin, undisturbed: dict[str, str], contents: Contents,
    journal_lines: Lines, number: int, code: int,
) -> None:  # fmt: skip
    out = tmp_path / "out"
    process = begin(checkpoint, out, 0.05)
    assert process.wait_for(lambda: journal_lines(out, "task") > 1)
    os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(number)
    _, messages = process.communicate(timeout=LIMIT_S)
    assert process.returncode == code
    assert "run the same command again to resume" in messages
    assert "Traceback" not in messages
    assert not (out / "config.json").exists()
    kept = journal_lines(out, "task")
    assert 2 <= kept < len(shardq.plan(checkpoint).tasks)
    steps: list[shardq.Progress] = []
    shardq.quantize(checkpoint, output_dir=out, limits=Limits(parallel=1), report=steps.append)
    assert steps[-1].resumed_bytes > 0
    assert contents(out) == undisturbed


def test_killed_supervisor_takes_its_workers_along(
    checkpoint: Path, tmp_path: Path, begin: Begin, undisturbed: dict[str, str], contents: Contents,
    journal_lines: Lines,
) -> None:  # fmt: skip
    out = tmp_path / "out"
    process = begin(checkpoint, out, 0.05)
    assert process.wait_for(lambda: journal_lines(out, "task") > 1)
    workers = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(workers, LIMIT_S)
    assert alive == []
    shardq.quantize(checkpoint, output_dir=out, limits=Limits(parallel=1))
    assert contents(out) == undisturbed


def test_signal_while_files_are_published(
    checkpoint: Path, tmp_path: Path, begin: Begin, undisturbed: dict[str, str], contents: Contents
) -> None:
    out = tmp_path / "out"
    process = begin(checkpoint, out, 0.1)
    assert process.wait_for((out / "model-00002-of-00003.safetensors").exists)
    assert not (out / "config.json").exists()
    process.send_signal(signal.SIGTERM)
    _, messages = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 143
    assert "run the same command again" in messages
    assert "Traceback" not in messages
    assert not (out / "config.json").exists()
    shardq.quantize(checkpoint, output_dir=out, limits=Limits(parallel=1))
    assert contents(out) == undisturbed


def test_second_run_is_refused_and_the_first_one_ends_well(
    checkpoint: Path, tmp_path: Path, begin: Begin, undisturbed: dict[str, str], contents: Contents,
    journal_lines: Lines,
) -> None:  # fmt: skip
    out = tmp_path / "out"
    first = begin(checkpoint, out, 0.1)
    assert first.wait_for(lambda: journal_lines(out, "task") > 0)
    second = begin(checkpoint, out, 0)
    _, messages = second.communicate(timeout=LIMIT_S)
    assert second.returncode == OutputLocked.exit_code
    assert f"pid {first.pid}," in messages
    _, messages = first.communicate(timeout=LIMIT_S)
    assert first.returncode == 0, messages
    assert contents(out) == undisturbed
