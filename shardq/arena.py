"""Arena: one reusable block of memory that a task carves its arrays from."""

import math
import mmap
import sys
from typing import Any, Final

import numpy as np
from numpy.typing import DTypeLike, NDArray

from shardq.files.direct import BLOCK_BYTES

ALIGN: Final = 64
GROWTH: Final = 4 << 20  # the block grows in steps, so that slightly larger tasks do not map it anew each time


class Arena:
    """A bump allocator over anonymous pages. `reset` makes all arrays taken before invalid."""

    def __init__(self) -> None:
        self._block = np.empty(0, np.uint8)
        self._used = 0

    def reset(self, size_bytes: int) -> None:
        """Forget all arrays and make room for `size_bytes`, alignment included."""
        self._used = 0
        if size_bytes > self._block.size:
            size = -(-size_bytes // GROWTH) * GROWTH
            self._block = np.empty(0, np.uint8)  # give the old pages back first
            pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            if sys.platform == "linux":  # huge pages make first touches four times cheaper; shared ones are never huge
                pages.madvise(mmap.MADV_HUGEPAGE)
            self._block = np.frombuffer(pages, np.uint8)

    def release(self) -> None:
        """Give the pages back; invalidates all arrays."""
        self._block, self._used = np.empty(0, np.uint8), 0

    def take(self, shape: tuple[int, ...], dtype: DTypeLike, offset: int | None = None) -> NDArray[Any]:
        """An uninitialised array, aligned to a cache line; with `offset`, where it will lie in a file, as far behind
        the beginning of a disk's block as it is there, which takes up to BLOCK_BYTES more."""
        kind = np.dtype(dtype)
        size = kind.itemsize * math.prod(shape)
        begin = self._used
        if offset is not None and offset % kind.itemsize == 0:  # numpy wants elements to lie at multiples of their size
            begin += (offset - begin) % BLOCK_BYTES
        self._used = -(-(begin + size) // ALIGN) * ALIGN
        assert self._used <= self._block.size, "a task took more than it reserved"
        return self._block[begin : begin + size].view(kind).reshape(shape)


def reserve(*sizes: tuple[tuple[int, ...], DTypeLike]) -> int:
    """Bytes that arrays of these shapes and types take from an arena."""
    return sum(-(-math.prod(shape) * np.dtype(dtype).itemsize // ALIGN) * ALIGN for shape, dtype in sizes)
