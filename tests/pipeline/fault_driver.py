"""Runs `shardq.quantize` again and again, each time with a fault at another call to the operating system, and after
each fault once more without one. A process of its own: every run is a fork of it, and only that dies.

    python fault_driver.py kill|error SOURCE OUT [delete-source]

Prints one JSON object: {"calls": how many there are, "wrong": [what went wrong, in words]}.
"""

import errno
import hashlib
import json
import logging
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import shardq
from shardq.errors import ShardqError

WATCHED: Final = ("pwrite", "fsync", "replace", "unlink", "mkdir", "rmdir", "ftruncate", "posix_fallocate")
CONFIG: Final = "config.json"
ERRORS: Final = (errno.ENOSPC, errno.EIO)
DONE, REFUSED, RAISED = 0, 10, 11  # exit codes of a run


def main(mode: str, source: Path, out: Path, delete_source: bool) -> None:
    """Every call in turn."""
    scene = Scene(source, out, delete_source)
    scene.reset()
    shardq.quantize(source, output_dir=out, limits=shardq.Limits(parallel=1))  # loads every module before the forks
    scene.reset()
    code, calls = scene.run(None, mode)
    assert code == DONE, f"the undisturbed run ended with {code}"
    expected = contents(out)
    wrong: list[str] = []
    for call in range(1, calls + 1):
        scene.reset()
        code, _ = scene.run(call, mode)
        wrong += [f"call {call}: {w}" for w in scene.judge(code, mode, expected)]
    print(json.dumps({"calls": calls, "wrong": wrong}))


class Scene:
    """A source that may be eaten up, and an output folder."""

    def __init__(self, source: Path, out: Path, delete_source: bool) -> None:
        self.original, self.out, self.delete_source = source, out, delete_source
        self.source = out.parent / "eaten" / source.name if delete_source else source

    def reset(self) -> None:
        """As before the first run."""
        shutil.rmtree(self.out, ignore_errors=True)
        if self.delete_source:
            shutil.rmtree(self.source, ignore_errors=True)
            shutil.copytree(self.original, self.source)

    def run(self, fault_at: int | None, mode: str) -> tuple[int, int]:
        """Exit code, or minus the signal, of one run, and the calls that it made."""
        counter = self.out.parent / "calls"
        counter.write_text("0")
        pid = os.fork()
        if pid == 0:
            os._exit(self._run_here(fault_at, mode, counter))
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), int(counter.read_text())

    def judge(self, code: int, mode: str, expected: dict[str, str]) -> list[str]:
        """What is wrong about the folder after a fault, and after the run that follows."""
        wrong: list[str] = []
        if code not in ({-signal.SIGKILL} if mode == "kill" else {DONE, REFUSED}):
            wrong.append(f"exit code {code}")
        there = contents(self.out) if self.out.exists() else {}
        shards = {n: h for n, h in expected.items() if n.endswith(".safetensors")}
        if CONFIG in there and any(there.get(n) != h for n, h in shards.items()):
            wrong.append(f"{CONFIG} beside incomplete shards")
        code, _ = self.run(None, mode)
        if code != DONE:
            wrong.append(f"the next run ended with {code}")
        elif contents(self.out) != expected:
            wrong.append("the next run's output differs")
        return wrong

    def _run_here(self, fault_at: int | None, mode: str, counter: Path) -> int:
        count = watch(fault_at, mode)
        limits = shardq.Limits(parallel=1, delete_source=self.delete_source)
        try:
            shardq.quantize(self.source, output_dir=self.out, limits=limits)
        except ShardqError as e:
            print(f"call {fault_at}: {e}", file=sys.stderr)
            return REFUSED
        except Exception:
            logging.getLogger(__name__).exception("call %s", fault_at)
            return RAISED
        counter.write_text(str(count()))
        return DONE


def watch(fault_at: int | None, mode: str) -> Callable[[], int]:
    """Count the calls of this process; make one of them fail, or be its last. Returns the counter."""
    count = 0

    def wrap(name: str) -> Callable[..., Any]:
        plain = getattr(os, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if count == fault_at and mode == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if count == fault_at:
                code = ERRORS[count % len(ERRORS)]
                raise OSError(code, os.strerror(code))
            # A killed process loses nothing that it has written, so waiting for the disk would prove nothing here.
            return None if name == "fsync" else plain(*args, **kwargs)

        return call

    for name in WATCHED:
        setattr(os, name, wrap(name))
    return lambda: count


def contents(folder: Path) -> dict[str, str]:
    """Every file below a folder, with its hash; the working folder counts, too."""
    return {
        p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in folder.rglob("*")
        if p.is_file()
    }


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), "delete-source" in sys.argv)
