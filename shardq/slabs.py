"""Source bytes of one task, tile by tile.

Two ways, equal in what they give. Worker processes map the file: the kernels then read the page cache in place, which
saves a third of a task's CPU time. A mapped page that cannot be read (the file was cut, the disk failed) kills the
process, which only a worker may risk; so where the caller itself does the work, tiles are read into a buffer.
"""

import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from shardq.errors import CorruptShard
from shardq.files.atomic import pread_exact, reading


class Slab(Protocol):
    """Consecutive bytes of a file."""

    def tile(self, offset: int, size_bytes: int) -> NDArray[np.uint8]:
        """Bytes from `offset` in the slab on; valid until the next call. Raises CorruptShard, SourceUnreadable."""


@dataclass(frozen=True, slots=True)
class ReadSlab:
    """Tiles are read into one buffer."""

    fd: int
    begin: int
    buffer: NDArray[np.uint8]  # at least as large as a tile
    what: str

    def tile(self, offset: int, size_bytes: int) -> NDArray[np.uint8]:
        """See Slab."""
        part = self.buffer[:size_bytes]
        pread_exact(self.fd, part.data, self.begin + offset, self.what)
        return part


@dataclass(frozen=True, slots=True)
class MappedSlab:
    """Tiles are views of the page cache."""

    pages: NDArray[np.uint8]

    def tile(self, offset: int, size_bytes: int) -> NDArray[np.uint8]:
        """See Slab."""
        return self.pages[offset : offset + size_bytes]


@contextmanager
def open_slab(
    fd: int, begin: int, size_bytes: int, buffer: NDArray[np.uint8], alignment: int, mapped: bool, what: str
) -> Iterator[Slab]:
    """The bytes [begin, begin + size_bytes) of a file, mapped when `mapped` is true and `begin` is a multiple of
    `alignment`: tensor data may start at any byte, kernels want whole elements.

    `buffer` takes a tile otherwise. Raises CorruptShard when the file is shorter, naming `what`.
    """
    if not mapped or begin % alignment or size_bytes == 0:
        yield ReadSlab(fd, begin, buffer, what)
        return
    with reading(what):
        size = os.fstat(fd).st_size
    if size < begin + size_bytes:
        raise CorruptShard(
            f"{what} is truncated: {begin + size_bytes - size} bytes are missing at the end of the file; get it again"
        )
    skip = begin % mmap.ALLOCATIONGRANULARITY
    with reading(what):
        pages = mmap.mmap(fd, size_bytes + skip, offset=begin - skip, access=mmap.ACCESS_READ)
    array: NDArray[Any] = np.frombuffer(pages, np.uint8)
    yield MappedSlab(array[skip:])  # the map goes with its last view
