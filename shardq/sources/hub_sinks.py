"""Where the bytes of a file go: a part file that is hashed on the way, or memory.

A sink lends its own memory to the socket, so that no byte is copied on its way in, and hands on what it has got in
large pieces.
"""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final, Protocol

from shardq.files.atomic import pread_exact, writing
from shardq.files.direct import DirectDisk, aligned_bytes
from shardq.files.writeback import start_writeback
from shardq.hash_meeting import HashMeeting

PIECE_BYTES: Final = 1 << 20  # written, hashed and reported at a time: large against a call, small against a cache
_REPORT_S: Final = 0.25  # a slow link reports smaller pieces
_WRITEBACK_BYTES: Final = 64 << 20


class Sink(Protocol):
    """Takes bytes in order."""

    @property
    def size_bytes(self) -> int:
        """All bytes taken so far."""
        ...

    def space(self) -> memoryview:
        """Where the next bytes go; not empty while bytes are missing."""
        ...

    def took(self, count: int) -> None:
        """So many bytes are in `space` now."""
        ...

    def flush(self) -> None:
        """Hand on what is here and report it, be it nothing. Memory that is lent stays lent."""
        ...

    def restart(self) -> None:
        """Forget everything and begin again."""
        ...


class MemorySink:
    """Fills the caller's memory."""

    def __init__(self, out: memoryview, on_bytes: Callable[[int], None]) -> None:
        self._out = out
        self._on_bytes = on_bytes
        self._reported = 0
        self.size_bytes = 0

    def space(self) -> memoryview:
        return self._out[self.size_bytes :]

    def took(self, count: int) -> None:
        self.size_bytes += count
        if self.size_bytes - self._reported >= PIECE_BYTES:
            self.flush()

    def flush(self) -> None:
        fresh, self._reported = self.size_bytes - self._reported, self.size_bytes
        self._on_bytes(fresh)

    def restart(self) -> None:
        taken, self.size_bytes, self._reported = self._reported, 0, 0
        self._on_bytes(-taken)


class FileSink:
    """Appends to a part file and hashes it on the way."""

    def __init__(self, fd: int, path: Path, on_bytes: Callable[[int], None], hashes: HashMeeting) -> None:
        self._hashes = hashes
        self._fd = fd
        self._path = path
        self._on_bytes = on_bytes
        self._disk = DirectDisk()
        self._room = aligned_bytes(PIECE_BYTES)
        self._buffer = self._room.data
        self._filled = 0  # of the buffer
        self._kept = 0  # of these, in the file
        self._stored = 0  # in the file
        self._started = 0  # of these, on their way to the disk
        self._flushed_at = time.monotonic()
        self.digest = self._hashes.new_digest()

    @property
    def size_bytes(self) -> int:
        return self._stored + self._filled - self._kept

    def resume(self, size_bytes: int) -> None:
        """Take what the part file has from an earlier call, unless that is more than the whole file.

        It is hashed as it is read: what a power cut left on the disk need not be what was written.
        """
        with writing(self._path):
            here = os.fstat(self._fd).st_size
            if here > size_bytes:
                os.ftruncate(self._fd, 0)
                return
        while self._stored < here:
            piece = self._buffer[: here - self._stored]
            pread_exact(self._fd, piece, self._stored, self._path.name)
            self._hashes.update(self.digest, piece)
            self._stored += len(piece)
            self._on_bytes(len(piece))

    def space(self) -> memoryview:
        return self._buffer[self._filled :]

    def took(self, count: int) -> None:
        self._filled += count
        if self._filled == PIECE_BYTES:
            self.flush()
            self._filled = self._kept = 0
        elif time.monotonic() - self._flushed_at >= _REPORT_S:
            self.flush()

    def flush(self) -> None:
        self._on_bytes(self.keep())
        self._flushed_at = time.monotonic()

    def keep(self) -> int:
        """Write what is here without a report. Returns the bytes written; raises DiskFull, NotWritable."""
        piece = self._buffer[self._kept : self._filled]
        with writing(self._path):
            self._disk.write(self._fd, self._room[self._kept : self._filled], self._stored)
        self._hashes.update(self.digest, piece)
        self._kept = self._filled  # the buffer goes on where it is: its rest may be lent
        self._stored += len(piece)
        if self._stored - self._started >= _WRITEBACK_BYTES:  # so that the last fsync has little left to do
            self._started = self._stored
            start_writeback(self._fd)
        return len(piece)

    def restart(self) -> None:
        with writing(self._path):
            os.ftruncate(self._fd, 0)
        taken, self._stored = self._stored, 0
        self._filled = self._kept = self._started = 0
        self.digest = self._hashes.new_digest()
        self._on_bytes(-taken)
