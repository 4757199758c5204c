"""Run a command and measure its whole process tree: wall clock, CPU time, peak memory. Linux."""

import ctypes
import os
import resource
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import psutil

SAMPLE_S: Final = 0.05
PR_SET_CHILD_SUBREAPER: Final = 36  # linux/prctl.h
FIELDS: Final = ("Rss", "Pss", "Pss_Anon", "Pss_Shmem")
LEAVE_S: Final = 10.0  # for helpers of a command that has ended


@dataclass(frozen=True, slots=True)
class Memory:
    """Memory of a process tree in bytes. Pages shared between its processes count once, but for rss_bytes."""

    rss_bytes: int  # sum of resident sets: shared pages count for every process
    pss_bytes: int  # mapped files included, which the system may drop at any time
    anon_shmem_bytes: int  # what cannot be dropped: heap, stacks, arenas, shared memory
    largest_bytes: int = 0  # the same of the process that has most of it


@dataclass(frozen=True, slots=True)
class Measured:
    """What one run took."""

    wall_s: float  # until its output is on the disk
    user_s: float
    system_s: float
    peak: Memory  # the peak of each figure by itself

    @property
    def cpu_s(self) -> float:
        """User and system time of all processes."""
        return self.user_s + self.system_s


def measure(
    command: Sequence[str], env: Mapping[str, str], log: Path, others: Sequence[int] = (), cap_bytes: int | None = None
) -> Measured:
    """Run `command` and then sync. Raises RuntimeError, with the log's end, when it fails.

    Helpers that outlive the command (a fork server) are adopted and waited for, so that their time counts; `others` are
    children of this process that have nothing to do with it. Of private memory each process of the command may ask for
    `cap_bytes`, whether it touches it or not (RLIMIT_DATA). Python's byte code is cached even where the caller's
    environment forbids it: to compile libraries again with each start is no part of a command.
    """
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    own_env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    peak = Memory(0, 0, 0, 0)
    began_s = time.perf_counter()
    with log.open("wb") as out:
        process = subprocess.Popen(command, env={**own_env, **env}, stdout=out, stderr=subprocess.STDOUT)
        if cap_bytes is not None:
            resource.prlimit(process.pid, resource.RLIMIT_DATA, (cap_bytes, cap_bytes))
        while process.poll() is None:
            peak = _larger(peak, tree_memory(process.pid))
            time.sleep(SAMPLE_S)
    os.sync()
    wall_s = time.perf_counter() - began_s
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}:\n{log.read_text()[-2000:]}")
    _adopt_the_rest(others)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return Measured(wall_s, after.ru_utime - before.ru_utime, after.ru_stime - before.ru_stime, peak)


def measure_again(
    command: Sequence[str], out: Path, env: Mapping[str, str], log: Path, others: Sequence[int] = ()
) -> Measured:
    """`measure` of the second of two runs; `out`, a file or folder that the command makes, goes in between, and stays
    at the end.

    The second writes into memory that the first has just left, as one of many runs does. A virtual machine hands free
    memory back to its host within seconds, and to bring it again costs ten times the CPU time of the write.
    """
    measure(command, env, log, others)
    if out.is_dir():
        shutil.rmtree(out)
    else:
        out.unlink()
    return measure(command, env, log, others)


def tree_memory(pid: int) -> Memory:
    """Memory of a process and all its descendants now; 0 where there is none."""
    total, largest_bytes = dict.fromkeys(FIELDS, 0), 0
    for p in _tree(pid):
        own = {field: kib << 10 for field, kib in _rollup(p)}
        total = {field: size + own.get(field, 0) for field, size in total.items()}
        largest_bytes = max(largest_bytes, own.get("Pss_Anon", 0) + own.get("Pss_Shmem", 0))
    return Memory(total["Rss"], total["Pss"], total["Pss_Anon"] + total["Pss_Shmem"], largest_bytes)


def _tree(pid: int) -> list[int]:
    try:
        return [pid, *(p.pid for p in psutil.Process(pid).children(recursive=True))]
    except psutil.NoSuchProcess:
        return []


def _rollup(pid: int) -> Iterator[tuple[str, int]]:
    """Field and KiB of /proc/PID/smaps_rollup; nothing for a process that has gone."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        field, _, rest = line.partition(":")
        if field in FIELDS:
            yield field, int(rest.split()[0])


def _larger(a: Memory, b: Memory) -> Memory:
    return Memory(
        max(a.rss_bytes, b.rss_bytes), max(a.pss_bytes, b.pss_bytes), max(a.anon_shmem_bytes, b.anon_shmem_bytes),
        max(a.largest_bytes, b.largest_bytes),
    )  # fmt: skip


def _adopt_the_rest(others: Sequence[int]) -> None:
    deadline_s = time.monotonic() + LEAVE_S
    while rest := [p.pid for p in psutil.Process().children() if p.pid not in others]:
        if time.monotonic() > deadline_s:
            raise RuntimeError(f"a process that the command left behind does not end within {LEAVE_S:g} s")
        for pid in rest:
            os.waitpid(pid, os.WNOHANG)
        time.sleep(0.005)
