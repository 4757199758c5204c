"""Bytes that are here before there is room for them in memory: a file without a name."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shardq.files.atomic import pread_exact, preallocate, pwrite_all, writing
from shardq.files.nameless import open_nameless


class WaitingRoom:
    """A file of a folder that goes when nobody holds it any more. Threads put and take parts of it side by side."""

    def __init__(self, folder: Path, size_bytes: int) -> None:
        """Raises DiskFull, NotWritable."""
        self._what = f"{folder.name}: pieces of the next block"
        self._file = open_nameless(folder, "block")
        preallocate(self._file.fileno(), size_bytes, self._what)

    def put(self, data: NDArray[np.uint8], offset: int) -> None:
        """Raises DiskFull, NotWritable."""
        with writing(self._what):
            pwrite_all(self._file.fileno(), data.data, offset)

    def take(self, offset: int, size_bytes: int) -> NDArray[np.uint8]:
        """What was put there. Raises SourceUnreadable."""
        data = np.empty(size_bytes, np.uint8)
        pread_exact(self._file.fileno(), data.data, offset, self._what)
        return data
