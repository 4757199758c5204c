"""A few open files, so that a worker does not open the same shard for every task."""

import os
from typing import Final

from shardq.files.atomic import reading, writing

OPEN_FILES: Final = 4


class Descriptors:
    """Least recently used file descriptors by path, all opened with the same flags."""

    def __init__(self, flags: int) -> None:
        self._flags = flags | getattr(os, "O_CLOEXEC", 0)
        self._open: dict[str, int] = {}

    def get(self, path: str) -> int:
        """An open descriptor of `path`. Raises SourceUnreadable, NotWritable."""
        fd = self._open.pop(path, None)
        if fd is None:
            if len(self._open) >= OPEN_FILES:
                os.close(self._open.pop(next(iter(self._open))))
            with reading(path) if self._flags & os.O_ACCMODE == os.O_RDONLY else writing(path):
                fd = os.open(path, self._flags)
        self._open[path] = fd
        return fd

    def __del__(self) -> None:
        """The last user is gone."""
        self.close()

    def close(self) -> None:
        """Close all: a path may soon name another file."""
        for fd in self._open.values():
            os.close(fd)
        self._open.clear()
