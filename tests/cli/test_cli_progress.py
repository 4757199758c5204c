"""Lines, rates and estimates of a run's progress."""

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from shardq.cli._console import Console
from shardq.cli._progress import pace, show_progress
from shardq.logs import LogConfig
from shardq.progress import Progress, Stage

TOTAL = 2_700_000_000


def step(done_bytes: int, resumed_bytes: int = 0, stage: Stage = "file", total_bytes: int = TOTAL) -> Progress:
    return Progress(stage, "model-00003-of-00008.safetensors", done_bytes, total_bytes, resumed_bytes, 0, 3, 8)


@pytest.mark.parametrize(
    ("progress", "elapsed_s", "text"),
    [
        (step(1_200_000_000), 1.5, "1.2/2.7 GB  800.0 MB/s  ETA 2s"),
        (step(1_200_000_000, resumed_bytes=600_000_000), 1.5, "1.2/2.7 GB  400.0 MB/s  ETA 4s"),
        (step(1_200_000_000, resumed_bytes=1_200_000_000), 1.5, "1.2/2.7 GB"),
        (step(0), 3.0, "0.0/2.7 GB"),
        (step(1_200_000_000), 0.0, "1.2/2.7 GB"),
        (step(TOTAL), 1.0, "2.7/2.7 GB  2.7 GB/s  ETA 0s"),
        (step(10_000_000), 1.0, "0.0/2.7 GB  10.0 MB/s  ETA 4m29s"),
        (step(100_000), 1.0, "0.0/2.7 GB  100.0 kB/s  ETA 7h29m"),
        (step(0, total_bytes=0), 1.0, "0.0/0.0 B"),
    ],
)
def test_pace_excludes_what_was_resumed(progress: Progress, elapsed_s: float, text: str) -> None:
    assert pace(progress, elapsed_s) == text


def console(quiet: bool) -> Console:
    return Console(as_json=False, verbose=False, quiet=quiet, log=LogConfig("warning", None))


def test_without_a_terminal_each_finished_shard_is_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    with show_progress(console(quiet=False)) as report:
        report(step(0, stage="start"))
        report(step(1_000_000_000, stage="work"))
        report(step(1_200_000_000))
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("shard 3/8 model-00003-of-00008.safetensors  1.2/2.7 GB  ")
    assert captured.err.count("\n") == 1


def test_resumed_run_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    with show_progress(console(quiet=False)) as report:
        report(step(1_000_000, resumed_bytes=1_000_000, stage="start"))
    assert capsys.readouterr().err == "resuming: 3/8 shards are done\n"


def test_quiet_run_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with show_progress(console(quiet=True)) as report:
        report(step(1_200_000_000))
    assert capsys.readouterr() == ("", "")


def test_bar_is_drawn_on_a_terminal_and_leaves_stdout_clean(demo_folder: Path, tmp_path: Path) -> None:
    master, terminal = pty.openpty()
    words = ["quantize", str(demo_folder), "-o", str(tmp_path / "out"), "--parallel", "1", "--json"]
    environment = {**os.environ, "TERM": "xterm", "NO_COLOR": "1"}
    try:
        result = subprocess.run(
            [sys.executable, "-P", "-m", "shardq.cli", *words],
            env=environment, stdout=subprocess.PIPE, stderr=terminal, check=False,
        )  # fmt: skip
        drawn = os.read(master, 1 << 16).decode()
    finally:
        os.close(terminal)
        os.close(master)
    assert result.returncode == 0, drawn
    assert json.loads(result.stdout)["already_done"] is False
    assert "shards 3/3" in drawn
    assert "model-00003-of-00003.safetensors" not in drawn
