"""One run at a time in an output folder.

The lock is the kernel's flock on the lock file, so it ends with the process that holds it, however that dies: a file
left behind by a dead run (or by one before a reboot, or in another container) is taken over. The file's content only
tells a person who holds it: one JSON object with host, pid, boot_id and started (UTC).

On NFS, GPFS, CephFS and Lustre (mounted with flock) the lock holds between hosts too. A file system without flock is
refused: guessing from file ages would let two runs write into one folder. Where flock works but reaches only one host
(Lustre mounted with localflock), a run on another host is not seen.
"""

import errno
import fcntl
import json
import logging
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, Self

from shardq.errors import NotWritable, OutputLocked
from shardq.files.atomic import pwrite_all, writing

logger = logging.getLogger(__name__)

_BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")
_NO_FLOCK: Final = frozenset({errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK})
_CONTENT_LIMIT_BYTES: Final = 4096


class FolderLock:
    """An exclusive lock on a file, held inside a `with` block."""

    def __init__(self, path: Path) -> None:
        """`path` is the lock file; its folder must exist."""
        self._path = path
        self._fd = -1

    def acquire(self) -> None:
        """Take the lock without waiting.

        Raises OutputLocked naming the holder, NotWritable where the file cannot be written or the file system has no
        flock, RuntimeError if this object holds it already.
        """
        if self._fd >= 0:
            raise RuntimeError(f"{self._path} is locked by this object already")
        with writing(self._path):
            fd = self._open_locked()
            try:
                previous = os.pread(fd, _CONTENT_LIMIT_BYTES, 0)
                if previous:
                    logger.info("%s: taken over from %s", self._path, _holder(previous))
                os.ftruncate(fd, 0)
                pwrite_all(fd, _content(), 0)
            except BaseException:
                os.close(fd)
                raise
        self._fd = fd

    def release(self) -> None:
        """Give the lock up; the file stays, empty, as deleting it would let two runs in."""
        if self._fd < 0:
            return
        fd, self._fd = self._fd, -1
        try:
            with writing(self._path):
                os.ftruncate(fd, 0)
        finally:
            os.close(fd)

    def __enter__(self) -> Self:
        self.acquire()
        return self

    def __exit__(self, *raised: object) -> None:
        self.release()

    def _open_locked(self) -> int:
        """A locked descriptor of the file that is at the path now."""
        while True:
            fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                self._flock(fd)
                if _is_at(fd, self._path):
                    return fd
            except BaseException:
                os.close(fd)
                raise
            os.close(fd)  # deleted or replaced before we had the lock

    def _flock(self, fd: int) -> None:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = _holder(os.pread(fd, _CONTENT_LIMIT_BYTES, 0))
            raise OutputLocked(
                f"{self._path.parent} is in use by another run ({holder}); "
                "wait for it, stop it, or choose another output folder"
            ) from error
        except OSError as error:
            if error.errno not in _NO_FLOCK:
                raise
            raise NotWritable(
                f"{self._path}: this file system cannot lock files ({error.strerror}); "
                "choose an output folder on another one, or mount it with flock"
            ) from error


def kernel_id() -> str:
    """Of the kernel that this process runs under, whose locks hold between all its processes; another after a boot."""
    return _BOOT_ID.read_text().strip() if _BOOT_ID.exists() else os.uname().nodename


def _is_at(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except FileNotFoundError:
        return False


def _content() -> bytes:
    content = {
        "host": os.uname().nodename,
        "pid": os.getpid(),
        "boot_id": kernel_id(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    return json.dumps(content).encode("ascii") + b"\n"


def _holder(content: bytes) -> str:
    """Who the content of a lock file names, in words."""
    try:
        holder = json.loads(content)
        return f"host {holder['host']}, pid {holder['pid']}, since {holder['started']}"
    except (ValueError, KeyError, TypeError):
        return "it has not written its name yet"
