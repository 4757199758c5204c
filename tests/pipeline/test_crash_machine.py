"""The same promises on real file systems and under real limits: the power cut of a disk, a disk that fills up, a memory
limit and the system's out-of-memory killer. What needs root says so where it is skipped."""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

import shardq
from shardq import Limits, Progress
from shardq.errors import DiskFull

HERE = Path(__file__).parent
LIMIT_S = 60.0
POWER_CUTS = 4
IMAGE_BYTES = 24 << 20
Contents = Callable[[Path], dict[str, str]]
Begin = Callable[..., Any]  # of conftest.py
Lines = Callable[[Path, str], int]
Mount = Callable[..., contextlib.AbstractContextManager[Path]]
needs_root = pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="needs root on Linux to mount")


@pytest.fixture
def mounted(tmp_path: Path) -> Mount:
    """mounted(what, *words of mount): a context with the folder where it is mounted; skips where that is refused."""

    @contextlib.contextmanager
    def mount(what: str | Path, *words: str) -> Iterator[Path]:
        folder = tmp_path / "mounted"
        folder.mkdir(exist_ok=True)
        done = subprocess.run(["mount", *words, str(what), str(folder)], check=False, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"this machine does not mount: {done.stderr.strip()}")
        try:
            yield folder
        finally:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)

    return mount


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """An empty ext4 file system in a file."""
    if not shutil.which("mkfs.ext4"):
        pytest.skip("needs mkfs.ext4")
    path = tmp_path / "disk.img"
    with path.open("wb") as f:
        f.truncate(IMAGE_BYTES)
    subprocess.run(["mkfs.ext4", "-q", "-F", "-m", "0", str(path)], check=True)
    return path


# --- the power -------------------------------------------------------------------------------------------------------


@needs_root
@pytest.mark.slow
def test_power_cut_of_a_real_disk(
    checkpoint: Path, tmp_path: Path, begin: Begin, mounted: Mount, image: Path, undisturbed: dict[str, str],
    contents: Contents,
) -> None:  # fmt: skip
    """A copy of the device in the middle of a run is what a power cut leaves."""
    options = ("-o", "loop,commit=1,noauto_da_alloc")  # deletions reach the disk soon, content late
    with mounted(image, *options) as disk:
        shutil.copytree(checkpoint, disk / "model")
    moments_s = random.Random(3)
    for trial in range(POWER_CUTS):
        run_image, cut_image = tmp_path / f"run{trial}.img", tmp_path / f"cut{trial}.img"
        shutil.copyfile(image, run_image)
        with mounted(run_image, *options) as disk:
            process = begin(disk / "model", disk / "out", 0.08, "--delete-source")
            assert process.wait_for((disk / "out" / ".shardq" / "journal.jsonl").exists)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(moments_s.uniform(0.5, 2.5))
            os.killpg(process.pid, signal.SIGSTOP)
            shutil.copyfile(run_image, cut_image)
            process.kill_group()
        with mounted(cut_image, *options) as disk:
            out = disk / "out"
            there = contents(out) if out.exists() else {}
            assert "config.json" not in there or there.items() >= undisturbed.items()
            shardq.quantize(disk / "model", output_dir=out, limits=Limits(parallel=1, delete_source=True))
            assert contents(out) == undisturbed
            assert not list((disk / "model").glob("*.safetensors"))


# --- the space -------------------------------------------------------------------------------------------------------


@needs_root
@pytest.mark.parametrize("kind", ["tmpfs", "ext4"])
def test_disk_that_others_fill_up(
    checkpoint: Path, mounted: Mount, image: Path, undisturbed: dict[str, str], contents: Contents, kind: str
) -> None:
    words = ("-t", "tmpfs", "-o", f"size={IMAGE_BYTES}") if kind == "tmpfs" else ("-o", "loop")
    with mounted("none" if kind == "tmpfs" else image, *words) as disk:
        ballast = disk / "ballast"

        def fill(step: Progress) -> None:
            if step.stage == "work" and not ballast.exists():
                with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as f:
                    while True:
                        f.write(bytes(1 << 16))

        with pytest.raises(DiskFull, match="No space left on device; free some space"):
            shardq.quantize(checkpoint, output_dir=disk / "out", limits=Limits(parallel=1), report=fill)
        assert {p.name for p in (disk / "out").iterdir()} == {".shardq"}
        ballast.unlink()
        shardq.quantize(checkpoint, output_dir=disk / "out", limits=Limits(parallel=1))
        assert contents(disk / "out") == undisturbed


def test_run_under_a_file_size_limit_is_completed_without_it(
    checkpoint: Path, tmp_path: Path, undisturbed: dict[str, str], contents: Contents
) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-P", str(HERE / "limited_cli.py"), "quantize", str(checkpoint), "-o", str(out)]
    for limit in ("3000", "100000"):  # within the journal; within a shard
        env = {**os.environ, "FILE_LIMIT_BYTES": limit}
        done = subprocess.run(command, env=env, check=False, capture_output=True, text=True, timeout=LIMIT_S)
        assert done.returncode == DiskFull.exit_code, done.stderr
        assert "File too large" in done.stderr
    shardq.quantize(checkpoint, output_dir=out, limits=Limits(parallel=1))
    assert contents(out) == undisturbed


# --- the memory ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class MemoryGroup:
    """A control group with a limit, of either version."""

    folder: Path
    events: str  # the file with the count of killed processes

    def kills(self) -> int:
        """Processes that the out-of-memory killer took."""
        lines = (self.folder / self.events).read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("oom_kill "))

    def add(self, pid: int) -> None:
        """Move a process into the group."""
        (self.folder / "cgroup.procs").write_text(str(pid))


@pytest.fixture
def memory_group() -> Iterator[Callable[[int], MemoryGroup]]:
    """memory_group(limit_bytes); skips where groups cannot be made."""
    made: list[MemoryGroup] = []

    def make(limit_bytes: int) -> MemoryGroup:
        old = Path("/sys/fs/cgroup/memory")
        top = old if old.is_dir() else old.parent
        group = MemoryGroup(top / f"shardq-test-{os.getpid()}-{len(made)}",
                            "memory.oom_control" if old.is_dir() else "memory.events")  # fmt: skip
        try:
            group.folder.mkdir()
            made.append(group)
            limit = "memory.limit_in_bytes" if old.is_dir() else "memory.max"
            (group.folder / limit).write_text(str(limit_bytes))
        except OSError as e:
            pytest.skip(f"this machine does not let this user make memory control groups: {e.strerror}")
        return group

    yield make
    for group in made:
        for _ in range(100):  # its processes are on their way out
            with contextlib.suppress(OSError):
                group.folder.rmdir()
                break
            time.sleep(0.05)


def test_run_inside_a_memory_limit_smaller_than_the_model(
    make_checkpoint: Callable[..., Path], tmp_path: Path, begin: Begin, memory_group: Callable[[int], MemoryGroup]
) -> None:
    cap = 130_000_000
    group = memory_group(cap)
    source, out = make_checkpoint(hidden=1536, layers=3), tmp_path / "out"
    assert sum(p.stat().st_size for p in source.iterdir()) > cap
    into = ("sh", "-c", f'echo $$ > {group.folder}/cgroup.procs && exec "$@"', "sh")
    process = begin(source, out, 0, "--max-ram", str(cap), before=into)
    _, messages = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 0, messages
    assert group.kills() == 0
    assert shardq.verify(out, source=source).problems == ()


def test_worker_that_the_system_kills_for_memory_costs_its_task_only(
    checkpoint: Path, tmp_path: Path, begin: Begin, undisturbed: dict[str, str], contents: Contents,
    journal_lines: Lines, memory_group: Callable[[int], MemoryGroup],
) -> None:  # fmt: skip
    group, out = memory_group(1 << 16), tmp_path / "out"
    process = begin(checkpoint, out, 0.1)
    run = psutil.Process(process.pid)

    def workers() -> list[psutil.Process]:
        return [p for p in run.children(recursive=True) if p.ppid() != run.pid]

    assert process.wait_for(lambda: journal_lines(out, "task") > 1 and len(workers()) == 2)
    group.add(workers()[0].pid)
    _, messages = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 0, messages
    assert group.kills() > 0
    assert "was killed (signal 9)" in messages
    assert contents(out) == undisturbed
