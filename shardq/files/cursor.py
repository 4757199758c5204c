"""Headers without a length at their front, read in order and without trust in any number of theirs."""

import os
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from shardq.errors import CorruptShard
from shardq.files.atomic import pread_exact, reading

Fetch = Callable[[int, int], bytes]  # offset, count -> that many bytes

_WINDOW_BYTES: Final = 1 << 16
_U64: Final = struct.Struct("<Q")


class Cursor:
    """A place in a file of a known size; takes nothing that is not there, and holds one window of the file.

    It only goes on. With `limit_bytes` nothing behind them is taken, however long the file is. Every error is a
    CorruptShard with `label`, the file as messages name it, and the place.
    """

    def __init__(self, fetch: Fetch, size_bytes: int, label: str, limit_bytes: int | None = None) -> None:
        self._fetch, self.label = fetch, label
        self._limited = limit_bytes is not None and limit_bytes < size_bytes
        self._end = min(size_bytes, limit_bytes) if limit_bytes is not None else size_bytes
        self.position = 0
        self._window, self._window_begin = b"", 0

    @property
    def left_bytes(self) -> int:
        """Bytes up to the end of what may be read."""
        return self._end - self.position

    def take(self, count: int, what: str) -> bytes:
        """The next `count` bytes; `what` names them in the message."""
        at = self._reach(count, what)
        self.position += count
        return self._window[at : at + count]

    def skip(self, count: int, what: str) -> None:
        """Go on behind `count` bytes."""
        self._check(count, what)
        self.position += count

    def whole(self, size_bytes: int, what: str, signed: bool = False) -> int:
        """A little-endian integer."""
        return int.from_bytes(self.take(size_bytes, what), "little", signed=signed)

    def text(self, count: int, limit: int, what: str, errors: str = "strict") -> str:
        """A string of `count` bytes of UTF-8; `errors` as `bytes.decode` has it, where "strict" refuses."""
        if not 0 <= count <= limit:
            raise self.wrong(f"{what} has {count} bytes, at most {limit} are expected")
        try:
            return self.take(count, what).decode("utf-8", errors)
        except UnicodeDecodeError as error:
            raise self.wrong(f"{what} is no UTF-8") from error

    def texts(self, count: int, what: str) -> Iterator[str]:
        """`count` strings, each behind its u64 length; what is no UTF-8 becomes surrogates ("surrogateescape")."""
        for _ in range(count):
            at = self._reach(8, what)  # which may change the window
            length: int = _U64.unpack_from(self._window, at)[0]
            self.position += 8
            at = self._reach(length, what)
            self.position += length
            yield self._window[at : at + length].decode("utf-8", "surrogateescape")

    def wrong(self, reason: str) -> CorruptShard:
        """The error for what cannot be read here."""
        return CorruptShard(f"{self.label}, byte {self.position}: {reason}; damaged, or something else: get it again")

    def _reach(self, count: int, what: str) -> int:
        """Where in the window the next `count` bytes begin, once they are all there."""
        at = self.position - self._window_begin
        if at + count <= len(self._window):
            return at
        self._check(count, what)
        self._window = self._fetch(self.position, min(max(count, _WINDOW_BYTES), self.left_bytes))
        self._window_begin = self.position
        if len(self._window) < count:
            raise self.wrong(f"{what} is cut off")
        return 0

    def _check(self, count: int, what: str) -> None:
        if count > self.left_bytes:
            of = f" of the {self._end} that a header may have" if self._limited else ""
            raise self.wrong(f"{what} needs {count} bytes, {self.left_bytes} are left{of}")


@contextmanager
def fetching(path: str | os.PathLike[str], what: str) -> Iterator[tuple[Fetch, int]]:
    """What reads ranges of a local file, and its size in bytes. Raises SourceUnreadable, CorruptShard for a file cut
    meanwhile."""
    with reading(path):
        fd = os.open(path, os.O_RDONLY)
        try:
            yield (lambda offset, count: _pread(fd, offset, count, what)), os.fstat(fd).st_size
        finally:
            os.close(fd)


def _pread(fd: int, offset: int, count: int, what: str) -> bytes:
    data = bytearray(count)
    pread_exact(fd, memoryview(data), offset, what)
    return bytes(data)
