"""Worker processes of a job, which a test may kill, and what is seen of the job meanwhile."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Self

HERE = Path(__file__).parent
LIMIT_S = 60.0  # for anything that takes a few seconds on an idle machine


class Watch(threading.Thread):
    """Notes which files have stood under each name in the job's `ready` and in its output."""

    def __init__(self, job: Path) -> None:
        super().__init__(daemon=True)
        self._output, self._over = job / "output", threading.Event()
        self.seen: dict[str, set[int]] = {}  # name -> inodes

    def run(self) -> None:
        while not self._over.wait(0.002):
            self.look()

    def look(self) -> None:
        for folder in (self._output / ".shardq" / "ready", self._output):
            with contextlib.suppress(FileNotFoundError):
                for entry in os.scandir(folder):
                    if entry.name.endswith((".safetensors", ".gguf")) and entry.name[0] != ".":
                        self.seen.setdefault(entry.name, set()).add(entry.inode())

    def end(self) -> None:
        self._over.set()
        self.join()
        self.look()


class Workers:
    """Processes of one command line. Tasks and moves take `slow_s` longer; leaving the block ends them all."""

    def __init__(
        self, job: Path, words: Sequence[str], slow_s: float, stale_s: float = 1.0, loud: bool = False
    ) -> None:
        self._words = ["worker", "--job", str(job), *words, "--parallel", "1", "--stale-after", str(stale_s), "-q"]
        self._stdout = subprocess.PIPE if loud else subprocess.DEVNULL
        self._environment = {**os.environ, "SLOW_S": str(slow_s)}
        self.alive: list[subprocess.Popen[str]] = []

    def start(self, *words: str) -> subprocess.Popen[str]:
        """One more."""
        command = [sys.executable, "-P", str(HERE / "slow_cli.py"), *self._words, *words]
        self.alive.append(
            subprocess.Popen(
                command,
                env=self._environment,
                start_new_session=True,
                text=True,
                stdout=self._stdout,
                stderr=subprocess.PIPE,
            )
        )
        return self.alive[-1]

    def kill(self, process: "subprocess.Popen[str]") -> None:
        """kill -9, with its children."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        self.alive.remove(process)

    def kill_some(self, kills: int, chance: random.Random, complete: Path, apart_s: tuple[float, float]) -> int:
        """Kill one after the other and start another in its place; how many were killed before the job was complete."""
        for number in range(kills):
            time.sleep(chance.uniform(*apart_s))
            if complete.exists():
                return number
            victim = chance.choice(self.alive)
            self.kill(victim)
            self.start("--worker", f"{number % 4}/4")
        return kills

    def finish(self) -> None:
        """Wait for all to end by themselves, with success."""
        for process in self.alive:
            _, messages = process.communicate(timeout=LIMIT_S)
            assert process.returncode == 0, messages

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for process in tuple(self.alive):
            self.kill(process)
