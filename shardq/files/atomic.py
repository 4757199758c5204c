"""Exact reads and durable writes through descriptors, and what the operating system's errors mean to a user.

A file appears whole or not at all: temporary name in the same folder -> write -> fsync -> rename -> fsync of the
folder.
"""

import errno
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final

from shardq.errors import CorruptShard, DiskFull, NotWritable, ShardqError, SourceUnreadable

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

UNFINISHED: Final = ".*.????????.tmp"  # glob for what has no name of its own yet
GATHERED_BYTES: Final = 1 << 20  # of parts of a file, from which on they are written for themselves
_NO_SPACE: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_ADVICE: Final = {
    errno.EACCES: "check its permissions and owner",
    errno.EPERM: "check its permissions and owner",
    errno.EROFS: "the file system is mounted read-only",
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "a part of the path is not a folder",
    errno.EISDIR: "a folder has this name",
    errno.EIO: "the device reports a hardware error; check the disk",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
}


def explain_os_error(error: OSError, path: str | os.PathLike[str], writing: bool) -> ShardqError:
    """The shardq error for a failed call on `path`.

    Out of space, over quota or over the file size limit: DiskFull. Anything else: NotWritable when `writing`,
    SourceUnreadable when reading.
    """
    where = os.fspath(path)
    reason = error.strerror or str(error)
    if error.errno in _NO_SPACE:
        return DiskFull(f"cannot write {where}: {reason}; free some space or choose another output folder")
    advice = _ADVICE.get(error.errno or 0, "see the reason given by the system")
    if writing:
        return NotWritable(f"cannot write {where}: {reason}; {advice}")
    return SourceUnreadable(f"cannot read {where}: {reason}; {advice}")


@contextmanager
def reading(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn any OSError inside the block into the shardq error for reading `path`."""
    try:
        yield
    except OSError as error:
        raise explain_os_error(error, path, writing=False) from error


@contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn any OSError inside the block into the shardq error for writing `path`."""
    try:
        yield
    except OSError as error:
        raise explain_os_error(error, path, writing=True) from error


def sync_folder(path: str | os.PathLike[str]) -> None:
    """Make renames and new names in folder `path` durable. Raises OSError.

    Some network file systems refuse fsync on a folder (EINVAL); they make names durable themselves.
    """
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    finally:
        os.close(fd)


def sync_way(path: str | os.PathLike[str], top: str | os.PathLike[str] | None = None) -> None:
    """Make names in folder `path` durable, and the names of the folders on the way to it: those below `top`, or all
    below the root of its file system.

    For folders that may be new: a durable name in a folder without one is lost with it. A folder that may not be read
    is left out, as it was there before. Raises OSError.
    """
    folder, last = os.path.abspath(path), top and os.path.abspath(top)
    sync_folder(folder)
    while folder != last and not os.path.ismount(folder):
        folder = os.path.dirname(folder)
        with suppress(PermissionError):
            sync_folder(folder)


def write_atomic(path: str | os.PathLike[str], *parts: "ReadableBuffer") -> None:
    """Put `parts`, one behind the other, at `path`, durably; whoever looks sees the old content or the new one, never a
    part of it.

    The mode follows the umask. On failure nothing is left behind. Raises DiskFull or NotWritable.
    """
    folder, name = os.path.split(os.path.abspath(path))
    temporary = os.path.join(folder, f".{name}.{os.urandom(4).hex()}.tmp")  # as UNFINISHED has it
    with writing(path):
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        renamed = False
        try:
            try:
                at = 0
                for part in _gathered(parts):
                    pwrite_all(fd, part, at)
                    at += memoryview(part).nbytes
                os.fsync(fd)
            finally:
                os.close(fd)
            os.replace(temporary, path)
            renamed = True
        finally:
            if not renamed:
                with suppress(OSError):
                    os.unlink(temporary)
        sync_folder(folder)


def _gathered(parts: "Iterable[ReadableBuffer]") -> "Iterator[ReadableBuffer]":
    """The same bytes in fewer parts: small neighbours together, large parts as they are."""
    small = bytearray()
    for part in parts:
        if len(small) + memoryview(part).nbytes < GATHERED_BYTES:
            small += memoryview(part)
            continue
        yield small
        yield part
        small = bytearray()
    yield small


def remove_unfinished(folder: Path) -> None:
    """Delete what processes that were killed have left of `write_atomic` in a folder, which no other may write to now.

    Raises NotWritable.
    """
    with writing(folder):
        for path in folder.glob(UNFINISHED):
            path.unlink(missing_ok=True)


def preallocate(fd: int, size_bytes: int, what: str) -> None:
    """Give the file exactly `size_bytes`, with real blocks where the file system can, so that a full disk shows now.

    `what` names the file in the message. An existing longer file is cut. Raises DiskFull or NotWritable.
    """
    with writing(what):
        os.ftruncate(fd, size_bytes)
        if size_bytes == 0 or not hasattr(os, "posix_fallocate"):
            return
        try:
            os.posix_fallocate(fd, 0, size_bytes)
        except OSError as error:
            # Not every file system can reserve blocks; the sparse file from ftruncate then has to do.
            if error.errno not in {errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS}:
                raise


def pwrite_all(fd: int, buffer: "ReadableBuffer", offset: int) -> None:
    """Write all bytes of a C-contiguous `buffer` (bytes, `.data` of an array) at `offset`. Raises OSError."""
    view = memoryview(buffer)
    if view.nbytes == 0:
        return
    rest = view.cast("B")
    while rest:
        written = os.pwrite(fd, rest, offset)
        rest = rest[written:]
        offset += written


def pread_exact(fd: int, out: memoryview, offset: int, what: str) -> None:
    """Fill `out` (C-contiguous, writable) from `offset` on.

    `what` names the shard and tensor for messages. One EIO is retried, as flaky disks and network mounts recover.
    Raises CorruptShard when the file ends early, SourceUnreadable when the system fails.
    """
    if out.nbytes == 0:
        return
    rest = out.cast("B")
    retried = False
    while rest:
        try:
            count = os.preadv(fd, [rest], offset)
        except OSError as error:
            if error.errno != errno.EIO or retried:
                raise explain_os_error(error, what, writing=False) from error
            retried = True
            continue
        if count == 0:
            raise CorruptShard(
                f"{what} is truncated: {len(rest)} of {out.nbytes} bytes are missing "
                f"at offset {offset}; get the file again"
            )
        rest = rest[count:]
        offset += count
