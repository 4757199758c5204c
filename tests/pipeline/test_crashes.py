"""Killed at any moment, a run leaves nothing that looks finished; the same command completes it to the same bytes."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

import shardq
from shardq import Limits

HERE = Path(__file__).parent
LIMIT_S = 60.0  # for anything that takes a second on an idle machine
KILLS = 20
Contents = Callable[[Path], dict[str, str]]
Begin = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def begin() -> Iterator[Begin]:
    """begin(source, out, slow_s, *options): `shardq quantize` in a process group of its own."""
    begun: list[subprocess.Popen[str]] = []

    def run(source: Path, out: Path, slow_s: float, *options: str) -> subprocess.Popen[str]:
        words = ["quantize", str(source), "-o", str(out), "--parallel", "2", *options]
        begun.append(
            subprocess.Popen(
                [sys.executable, "-P", str(HERE / "slow_cli.py"), *words],
                env={**os.environ, "SLOW_S": str(slow_s)},
                start_new_session=True,
                text=True,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
            )
        )
        return begun[-1]

    yield run
    for process in begun:
        with process:
            kill_group(process)


def kill_group(process: subprocess.Popen[str]) -> None:
    """kill -9 for the run, its fork server and its workers."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def wait_for(process: subprocess.Popen[str], condition: Callable[[], bool]) -> bool:
    """True once it holds, False if the process ends before."""
    deadline_s = time.monotonic() + LIMIT_S
    while not condition():
        if process.poll() is not None:
            return False
        assert time.monotonic() < deadline_s, "nothing happens"
        time.sleep(0.002)
    return True


def journal_lines(out: Path, event: str) -> int:
    try:
        return (out / ".shardq" / "journal.jsonl").read_text().count(f'"event":"{event}"')
    except FileNotFoundError:
        return 0


@pytest.fixture(scope="session")
def undisturbed(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory, contents: Contents) -> dict[str, str]:
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    shardq.quantize(checkpoint, output_dir=out, limits=Limits(parallel=1))
    return contents(out)


@pytest.mark.slow
@pytest.mark.parametrize("words", [("kill", "delete-source"), ("error",)], ids=["kill", "error"])
def test_fault_at_every_call_to_the_system(words: tuple[str, ...], make_checkpoint: Callable[..., Path]) -> None:
    source = make_checkpoint(layers=2, mlp=False)
    command = [sys.executable, "-P", str(HERE / "fault_driver.py"), words[0], str(source), str(source.parent / "out")]
    done = subprocess.run([*command, *words[1:]], check=False, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["wrong"] == [], done.stderr
    assert found["calls"] > 100


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
            if wait_for(process, (out / ".shardq" / "journal.jsonl").exists):
                try:
                    process.wait(moments_s.uniform(0, 0.6) if kills < KILLS else LIMIT_S)
                except subprocess.TimeoutExpired:
                    kill_group(process)
                    kills += 1
                    there = contents(out)
                    assert "config.json" not in there or there.items() >= undisturbed.items()
                    continue
            assert process.wait() == 0, process.communicate()[1]
            break
        assert contents(out) == undisturbed
    assert shardq.verify(out, deep=True, source=checkpoint).problems == ()


def test_killed_worker_costs_its_task_only(
    checkpoint: Path, tmp_path: Path, begin: Begin, undisturbed: dict[str, str], contents: Contents
) -> None:
    out = tmp_path / "out"
    process = begin(checkpoint, out, 0.1)
    run = psutil.Process(process.pid)

    def workers() -> list[psutil.Process]:
        return [p for p in run.children(recursive=True) if p.ppid() != run.pid]

    assert wait_for(process, lambda: journal_lines(out, "task") > 1 and len(workers()) == 2)
    workers()[0].kill()
    _, messages = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 0
    assert "was killed (signal 9)" in messages
    assert contents(out) == undisturbed


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signal_stops_in_order_and_the_same_command_resumes(
    checkpoint: Path, tmp_path: Path, begin: Begin, undisturbed: dict[str, str], contents: Contents, number: int,
    code: int,
) -> None:  # fmt: skip
    out = tmp_path / "out"
    process = begin(checkpoint, out, 0.05)
    assert wait_for(process, lambda: journal_lines(out, "task") > 1)
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
    checkpoint: Path, tmp_path: Path, begin: Begin, undisturbed: dict[str, str], contents: Contents
) -> None:
    out = tmp_path / "out"
    process = begin(checkpoint, out, 0.05)
    assert wait_for(process, lambda: journal_lines(out, "task") > 1)
    workers = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(workers, LIMIT_S)
    assert alive == []
    shardq.quantize(checkpoint, output_dir=out, limits=Limits(parallel=1))
    assert contents(out) == undisturbed
