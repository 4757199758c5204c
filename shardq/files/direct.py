"""Large pieces of output files, to the disk and back past the page cache.

A page of the cache has to be found, filled and written back: 0.35 to 0.45 CPU-s/GB, and three times that on a virtual
machine whose host has taken free memory back. A disk that is given whole blocks takes 0.03 from memory that is used
again, and drives out nothing that others have in the cache. But who writes so waits for the disk, and what is hashed or
quantized afterwards has to be read from it. So only disks are given them that take or give a gigabyte in the time that
the cache costs; others are better written behind our back.
"""

import errno
import fcntl
import mmap
import os
import time
from typing import Final

import numpy as np
from numpy.typing import NDArray

from shardq.files.atomic import pwrite_all

BLOCK_BYTES: Final = 4096  # of a disk: files take whole ones; past the cache, memory, offsets and sizes are multiples
LEAST_BYTES: Final = 256 << 10  # of a piece: calls for smaller ones take as long as pages of the cache
ROOM_BYTES: Final = 2 << 20  # of aligned memory: a tile, and what lies beside it in its blocks
TRIAL_BYTES: Final = 32 << 20  # after which the disk is judged, again and again
FAST_BYTES_PER_S: Final = 2e9
_FLAG: Final = getattr(os, "O_DIRECT", 0)  # Linux
_REFUSED: Final = frozenset({errno.EINVAL, errno.EOPNOTSUPP})  # by file systems that have no such way


class DirectDisk:
    """The way past the cache for the files of one process, open as long as the disk proves fast."""

    def __init__(self) -> None:
        self._is_open = _FLAG != 0
        self._moved_bytes = 0  # since the disk was last judged
        self._spent_s = 0.0
        self._copies: NDArray[np.uint8] | None = None  # of what is not aligned

    def write(self, fd: int, data: NDArray[np.uint8], offset: int) -> None:
        """Write all bytes at `offset`, in order: whole blocks past the cache; the ends, whose blocks may be shared with
        pieces that others write, through it. Raises OSError."""
        done = min(data.size, -offset % BLOCK_BYTES)
        blocks = data[done : done + (data.size - done) // BLOCK_BYTES * BLOCK_BYTES]
        pwrite_all(fd, data[:done].data, offset)
        if blocks.size >= LEAST_BYTES and self._begin(fd):
            try:
                done += self._write_blocks(fd, blocks, offset + done)
            finally:
                _end(fd)
        pwrite_all(fd, data[done:].data, offset + done)

    def read(self, fd: int, room: NDArray[np.uint8], offset: int) -> int:
        """Fill aligned room for whole blocks from the beginning of a block on. Returns how many bytes are there: fewer
        at the end of a file, none where the common way is to be taken, which also says what is wrong."""
        if room.size < LEAST_BYTES or not self._begin(fd):
            return 0
        began_s = time.monotonic()
        try:
            count = os.preadv(fd, [room.data], offset)
        except OSError:
            self._is_open = False
            return 0
        finally:
            _end(fd)
        self._judge(count, time.monotonic() - began_s)
        return count

    def _write_blocks(self, fd: int, blocks: NDArray[np.uint8], offset: int) -> int:
        """Returns how many bytes the disk has taken, from the first on. Raises OSError."""
        done = 0
        while done < blocks.size and self._is_open:
            part = self._aligned(blocks[done:])
            began_s = time.monotonic()
            try:
                written = os.pwrite(fd, part.data, offset + done)
            except OSError as error:
                if error.errno not in _REFUSED:
                    raise
                self._is_open = False
                break
            self._judge(written, time.monotonic() - began_s)
            done += written
            if written < part.size:  # as of a disk that is nearly full: the common way says what is wrong
                break
        return done

    def _aligned(self, data: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """The same bytes, or the first of them, in memory that the disk can take them from."""
        if data.ctypes.data % BLOCK_BYTES == 0:
            return data
        if self._copies is None:
            self._copies = aligned_bytes(ROOM_BYTES)
        part = self._copies[: data.size]
        part[:] = data[: part.size]
        return part

    def _judge(self, moved_bytes: int, spent_s: float) -> None:
        """A disk that is slow on the average is not asked again, be it that others keep it busy."""
        self._moved_bytes += moved_bytes
        self._spent_s += spent_s
        if self._moved_bytes >= TRIAL_BYTES:
            self._is_open = self._moved_bytes >= FAST_BYTES_PER_S * self._spent_s
            self._moved_bytes, self._spent_s = 0, 0.0

    def _begin(self, fd: int) -> bool:
        """From here on a descriptor, which has no other flags, goes past the cache; False where that cannot be."""
        if self._is_open:
            try:
                fcntl.fcntl(fd, fcntl.F_SETFL, _FLAG)
            except OSError:
                self._is_open = False
        return self._is_open


def _end(fd: int) -> None:
    fcntl.fcntl(fd, fcntl.F_SETFL, 0)


def whole_blocks(size_bytes: int) -> int:
    """Bytes of the blocks that so many bytes take."""
    return -(-size_bytes // BLOCK_BYTES) * BLOCK_BYTES


def aligned_bytes(size_bytes: int) -> NDArray[np.uint8]:
    """Memory of its own that begins with a block."""
    return np.frombuffer(mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), np.uint8)
