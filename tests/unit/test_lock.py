"""FolderLock: one holder, however the holder before it ended."""

import contextlib
import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from shardq.errors import NotWritable, OutputLocked
from shardq.lock import FolderLock

HOLD = """
import sys, time
from pathlib import Path
from shardq.lock import FolderLock
with FolderLock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "lock"


def test_content_names_the_holder(path: Path) -> None:
    with FolderLock(path):
        content = json.loads(path.read_bytes())
        assert content["host"] == socket.gethostname()
        assert content["pid"] == os.getpid()
        assert set(content) == {"host", "pid", "boot_id", "started"}
    assert path.read_bytes() == b""


def test_second_holder_is_refused_with_the_name_of_the_first(path: Path) -> None:
    with FolderLock(path):
        with pytest.raises(OutputLocked) as caught, FolderLock(path):
            pass
        assert f"host {socket.gethostname()}, pid {os.getpid()}" in str(caught.value)
        assert str(path.parent) in str(caught.value)
        assert json.loads(path.read_bytes())["pid"] == os.getpid()
    with FolderLock(path):
        pass


def test_other_process_holds_until_it_is_killed(path: Path) -> None:
    search = os.pathsep.join(p for p in sys.path if p)
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", HOLD, str(path)],
        env=os.environ | {"PYTHONPATH": search},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        with pytest.raises(OutputLocked, match=f"pid {process.pid},"):
            FolderLock(path).acquire()
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert json.loads(path.read_bytes())["pid"] == process.pid
    with FolderLock(path):
        assert json.loads(path.read_bytes())["pid"] == os.getpid()


@pytest.mark.parametrize("content", [b"{}", b"not json", b'{"host": "gone", "pid": 1}', b"x" * 9000])
def test_file_of_a_dead_run_is_taken_over(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with FolderLock(path):
        assert json.loads(path.read_bytes())["pid"] == os.getpid()


@pytest.mark.parametrize(
    ("host", "pid", "boot_id"),
    [
        (socket.gethostname(), os.getppid(), None),  # another process has its number by now
        (socket.gethostname(), 1, "00000000-0000-0000-0000-000000000000"),  # the machine has started anew
        ("elsewhere", 1, "00000000-0000-0000-0000-000000000000"),  # a shared disk, a container
    ],
)
def test_name_of_a_process_that_lives_holds_nothing(path: Path, host: str, pid: int, boot_id: str | None) -> None:
    """Only the kernel's lock counts."""
    with FolderLock(path):
        content = json.loads(path.read_bytes())
    content |= {"host": host, "pid": pid} | ({"boot_id": boot_id} if boot_id else {})
    path.write_text(json.dumps(content))
    with FolderLock(path):
        assert json.loads(path.read_bytes())["pid"] == os.getpid()


def test_one_of_many_gets_the_lock_of_a_dead_run(path: Path) -> None:
    path.write_text('{"host": "gone", "pid": 1, "started": "long ago"}')
    locks = [FolderLock(path) for _ in range(5)]
    got: list[FolderLock] = []
    for lock in locks:
        with contextlib.suppress(OutputLocked):
            lock.acquire()
            got.append(lock)
    assert got == locks[:1]
    got[0].release()


def test_holder_without_content_is_still_a_holder(path: Path) -> None:
    with path.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(OutputLocked, match="not written its name"):
            FolderLock(path).acquire()


def test_file_replaced_while_waiting_for_it_is_not_the_lock(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flock = fcntl.flock
    calls: list[int] = []

    def replace_once(fd: int, operation: int) -> None:
        if not calls:
            path.unlink()
        calls.append(fd)
        flock(fd, operation)

    monkeypatch.setattr(fcntl, "flock", replace_once)
    with FolderLock(path):
        assert len(calls) == 2
        monkeypatch.setattr(fcntl, "flock", flock)
        with pytest.raises(OutputLocked):
            FolderLock(path).acquire()


def test_file_system_without_flock_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(fd: int, operation: int) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with pytest.raises(NotWritable, match="cannot lock files"):
        FolderLock(path).acquire()


def test_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotWritable, match="nowhere"):
        FolderLock(tmp_path / "nowhere" / "lock").acquire()


def test_failed_attempts_leave_no_descriptor_open(path: Path) -> None:
    with FolderLock(path):
        before = len(os.listdir("/proc/self/fd")) if sys.platform == "linux" else None
        for _ in range(5):
            with pytest.raises(OutputLocked):
                FolderLock(path).acquire()
        if before is not None:
            assert len(os.listdir("/proc/self/fd")) == before


def test_object_that_holds_cannot_acquire_again(path: Path) -> None:
    lock = FolderLock(path)
    with lock, pytest.raises(RuntimeError, match="already"):
        lock.acquire()
    lock.release()
