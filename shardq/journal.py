"""The append-only record of finished work: what a run may rely on after a crash.

One event per line:

    +--------------+-------+--------------------------------+---------+
    | 8 hex digits | space | one JSON object, compact ASCII | newline |
    +--------------+-------+--------------------------------+---------+
      CRC-32 of the JSON bytes (zlib.crc32, lower case)

Replay stops at the first line that is short, damaged or not an object, and cuts the file there: a torn tail means that
the last events did not happen.

Events, by the key "event". The pipeline writes and reads them; this module knows none of them.

    | event   | other keys                   | durable | tells                                                      |
    | ------- | ---------------------------- | ------- | ---------------------------------------------------------- |
    | start   | identity                     | yes     | what the run was asked to make; always the first           |
    | stamps  | modified                     | yes     | when each shard of a source folder was last changed, in ns |
    | fetched | shard, sha256                | no      | a source shard is staged and its content was verified      |
    | task    | id, checksum, sse, ssw, max, | no      | a task's output bytes are written, perhaps not yet to disk |
    |         | swe, ends, zeroed            |         | figures.Figures                                            |
    |         | and losses                   |         | figures.Losses, where scales were searched                 |
    |         | and amax                     |         | the largest magnitude that its scales were taken from      |
    | amax    | tensor, value                | no      | a tensor's largest magnitude, from verified bytes          |
    | lent    | to, shard, sha256            | no      | what one shard borrows of another, from verified bytes     |
    | sealed  | file, sha256, size           | yes     | an output file is complete and on the disk                 |
    | settled | shard                        | yes     | all that becomes of a source shard is on the disk, though  |
    |         |                              |         | files that it is in may not be complete                    |
    | unsettled | shards                     | yes     | it was, but such a file is gone                            |
    | distrust |                             | yes     | what is neither settled nor sealed may not be on the disk, |
    |         |                              |         | also where it can be read                                  |
    | freed   | shard                        | no      | a source shard is deleted, as nothing needs it any more    |
    | uploaded | file, to                    | yes     | a sealed file is in the storage of a destination           |

An event that is not durable becomes so with the next durable one, being before it in the file; its output bytes do not,
so whoever replays a task event checks the checksum. Only one process may have a journal open; the folder's lock sees to
that.
"""

import json
import logging
import os
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final, Self

from shardq.errors import SourceUnreadable
from shardq.files.atomic import pwrite_all, reading, sync_way, writing

logger = logging.getLogger(__name__)

CRC_DIGITS: Final = 8


class Journal:
    """An open journal file; `open` makes one."""

    def __init__(self, path: Path, fd: int, size_bytes: int) -> None:
        """Take over descriptor `fd`, whose first `size_bytes` are whole lines."""
        self._path = path
        self._fd = fd
        self._size_bytes = size_bytes

    @classmethod
    def open(cls, path: Path) -> tuple[Self, list[dict[str, Any]]]:
        """Open or create the journal; return it with the events it holds, oldest first.

        Cuts a torn tail off, and all that it returns is on the disk. Raises NotWritable or DiskFull.
        """
        with writing(path):
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                events, good = _replay(fd)
                torn_bytes = os.fstat(fd).st_size - len(good)
                if torn_bytes:
                    logger.warning("%s: cut %d bytes of a torn tail", path, torn_bytes)
                    os.ftruncate(fd, len(good))
                if events:  # after an fsync that failed, pages may be read that never reached the disk
                    pwrite_all(fd, good, 0)
                if events or torn_bytes:
                    os.fsync(fd)
                if not events:
                    sync_way(path.parent)
            except BaseException:
                os.close(fd)
                raise
        return cls(path, fd, len(good)), events

    def append(self, event: Mapping[str, object], durable: bool) -> None:
        """Write one event; with `durable` it and all before it are on the disk on return.

        Raises DiskFull or NotWritable; the event then counts as not written and the next one takes its place. NaN and
        infinities are written as Python's json does.
        """
        line = _line(event)
        with writing(self._path):
            # At a fixed offset: what a failed write left behind is overwritten or cut by replay.
            pwrite_all(self._fd, line, self._size_bytes)
            if durable:
                os.fsync(self._fd)
        self._size_bytes += len(line)

    def close(self) -> None:
        """Close the file; nothing may be appended after it. May be called again."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()


def read_first(path: Path) -> dict[str, Any] | None:
    """The first event of a journal, which may be another process's; None without one. Raises SourceUnreadable."""
    try:
        with reading(path), path.open("rb") as file:
            return _event(file.readline())
    except SourceUnreadable:
        if path.exists():
            raise
        return None


def encode_events(events: Iterable[Mapping[str, object]]) -> bytes:
    """A journal of these events, for a file that is put in place as a whole."""
    return b"".join(map(_line, events))


def _line(event: Mapping[str, object]) -> bytes:
    text = json.dumps(dict(event), separators=(",", ":")).encode("ascii")
    return b"%08x %s\n" % (zlib.crc32(text), text)


def _replay(fd: int) -> tuple[list[dict[str, Any]], bytes]:
    """The events of the whole lines at the start of the file, and these lines."""
    events: list[dict[str, Any]] = []
    lines: list[bytes] = []
    with os.fdopen(os.dup(fd), "rb") as file:
        for line in file:
            event = _event(line)
            if event is None:
                break
            events.append(event)
            lines.append(line)
    return events, b"".join(lines)


def _event(line: bytes) -> dict[str, Any] | None:
    """The event of a line, None for a bad or empty one."""
    text = line[CRC_DIGITS + 1 : -1]
    if line != b"%08x %s\n" % (zlib.crc32(text), text):
        return None
    try:
        event = json.loads(text)
    except ValueError:
        return None
    return event if isinstance(event, dict) else None
