"""Work in a process apart: what comes back of it, and how it ends with its command."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import psutil
import pytest

from shardq.errors import BudgetTooSmall, Interrupted, TaskFailed, Terminated

COMMAND: Final = Path(__file__).with_name("apart_command.py")
LIMIT_S: Final = 60.0


def _start(deed: str, *words: str, cwd: Path | None = None) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, str(COMMAND), deed, *words], cwd=cwd, start_new_session=True, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def _wait_for_work(process: "subprocess.Popen[str]") -> int:
    """The process apart, which has begun."""
    assert process.stdout
    begun, _ = process.stdout.readline(), process.stdout.readline()
    return int(begun.split()[1])


def _run(deed: str, *words: str, cwd: Path | None = None) -> tuple[int, Sequence[str], str]:
    with _start(deed, *words, cwd=cwd) as process:
        out, errors = process.communicate(timeout=LIMIT_S)
    return process.returncode, out.splitlines(), errors


def test_a_result_comes_back(tmp_path: Path) -> None:
    """Wherever the user is: modules of the current folder are none of Python's. Ctrl-C was held back from the start."""
    (tmp_path / "signal.py").write_text("raise RuntimeError('imported from the current folder')")
    code, out, errors = _run("count", cwd=tmp_path)
    assert (code, out[1:], errors) == (0, ["100000 []"], "")
    assert out[0].endswith("SIGINT blocked: True")


def test_an_error_keeps_its_class() -> None:
    assert _run("refuse")[::2] == (BudgetTooSmall.exit_code, "error: too small: 3 bytes\n")


def test_a_bug_is_one_line_and_its_traceback_is_logged(tmp_path: Path) -> None:
    code, _, errors = _run("fail", "--log-file", str(tmp_path / "log"))
    assert code == TaskFailed.exit_code
    assert errors.splitlines()[-1] == "error: counting: ValueError: a bug, in two lines"
    logged = (tmp_path / "log").read_text()
    assert "a word of the work" in logged
    assert "in two lines" in logged.split("Traceback")[1]


def test_a_death_is_told() -> None:
    code, _, errors = _run("die")
    assert code == TaskFailed.exit_code
    assert errors.startswith("error: counting: its process was killed (signal 9), likely out of memory: count to less")


@pytest.mark.parametrize("whole_group", [True, False], ids=["group", "command"])
@pytest.mark.parametrize(("number", "kind"), [(signal.SIGINT, Interrupted), (signal.SIGTERM, Terminated)])
def test_a_signal_ends_both(number: signal.Signals, kind: type[Interrupted], whole_group: bool) -> None:
    with _start("wait") as process:
        apart = _wait_for_work(process)
        (os.killpg if whole_group else os.kill)(process.pid, number)
        out, errors = process.communicate(timeout=LIMIT_S)
    assert (process.returncode, errors) == (
        kind.exit_code,
        "error: counting was stopped: run the same command again to go on\n",
    )
    assert out == "left in order\n"
    assert not psutil.pid_exists(apart)


@pytest.mark.parametrize("later_s", [0.0, 0.02, 0.05])
def test_ctrl_c_while_it_starts_is_the_commands_alone(later_s: float) -> None:
    """Whenever it comes: the process that starts prints no traceback, as it never sees it."""
    with _start("wait") as process:
        while len(psutil.Process(process.pid).children()) < 2:  # the other one is multiprocessing's tracker
            assert process.poll() is None
        time.sleep(later_s)
        os.killpg(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=LIMIT_S)
    assert process.returncode == Interrupted.exit_code
    assert errors == "error: counting was stopped: run the same command again to go on\n"


@pytest.mark.slow
def test_what_does_not_look_at_signals_is_killed() -> None:
    with _start("compute") as process:
        apart = _wait_for_work(process)
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=LIMIT_S)
    assert (process.returncode, out) == (Interrupted.exit_code, "")
    assert not psutil.pid_exists(apart)


def test_it_ends_when_its_command_is_killed() -> None:
    with _start("wait") as process:
        apart = psutil.Process(_wait_for_work(process))
        process.kill()
        _, alive = psutil.wait_procs([apart], LIMIT_S)
    assert alive == []
