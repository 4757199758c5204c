"""Range mode: brings remote shards piece by piece into memory that workers read in place; no source file on disk.

A few slots of memory go round: a thread fills one with the next span of its shard, the pipeline hands its bundles to
workers, and gives the slot back when the last of them is done. Every byte of a shard passes by in order, so that its
hash is taken and compared; nothing made of a shard may be kept before that.
"""

import logging
import mmap
import os
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from typing import Final

from shardq.checkpoint import Shard
from shardq.errors import BadOption, BudgetTooSmall, ChecksumMismatch, ShardqError, TaskFailed
from shardq.hash_meeting import HashMeeting
from shardq.lender import OpenFile
from shardq.loans import Digest, Loan, Pair, RangeDigest
from shardq.spans import Span

logger = logging.getLogger(__name__)
THREADS: Final = 2
PIECE_BYTES: Final = 1 << 20  # hashed at a time, perhaps beside one of another stream


@dataclass(frozen=True, slots=True)
class Slot:
    """Memory for one span, which any process of this user may open by its path."""

    fd: int
    path: str
    memory: mmap.mmap


@dataclass(frozen=True, slots=True)
class Piece:
    """A span that has arrived."""

    span: Span
    slot: Slot
    origin: int  # offset in the shard of the slot's first byte


@dataclass(frozen=True, slots=True)
class Passed:
    """The end of a shard: all spans have arrived with the right hash, or not, or an error came in between."""

    shard: Shard
    sha256: str | None  # None: what arrived is not what the source promises
    error: ShardqError | None
    digests: Mapping[Pair, Digest] = field(default_factory=dict)  # of what this shard lends


class Streamer:
    """Streams shards on background threads. `ready` is a descriptor that becomes readable when there is news."""

    def __init__(self, open_file: OpenFile, slots: int, slot_bytes: int) -> None:
        """Begin with `slots` slots of `slot_bytes`. Raises BadOption, BudgetTooSmall where the system
        has no such memory."""
        self._open_file = open_file
        self._hashes = HashMeeting()
        self.moved_bytes = 0  # so far, over all shards
        self._todo: deque[_Work] = deque()
        self._change = threading.Condition()
        self._stop = False
        self._news: queue.SimpleQueue[Piece | Passed] = queue.SimpleQueue()
        self._slots = [_make_slot(slot_bytes + mmap.ALLOCATIONGRANULARITY) for _ in range(slots)]
        self._free = list(self._slots)
        self.ready, self._wake = os.pipe()
        self._limit_threads = min(THREADS, slots)
        self._threads: list[threading.Thread] = []  # come with the first shards: a process with some cannot fork

    def start(self, shard: Shard, spans: tuple[Span, ...], loans: tuple[Loan, ...] = ()) -> None:
        """Queue a shard. No span may be longer than a slot; `loans`: what the shard lends."""
        with self._change:
            self._todo.append((shard, spans, loans))
            self._change.notify_all()
        if len(self._threads) < self._limit_threads:
            self._threads.append(threading.Thread(target=self._work, daemon=True))
            self._threads[-1].start()

    def take(self) -> list[Piece | Passed]:
        """What has happened since the last call."""
        news: list[Piece | Passed] = []
        while not self._news.empty():
            news.append(self._news.get())
            os.read(self.ready, 1)
        return news

    def give_back(self, slot: Slot) -> None:
        """No worker reads this slot any more."""
        with self._change:
            self._free.append(slot)
            self._change.notify_all()

    def close(self) -> None:
        """Stop, wait for the threads to notice, and let the memory go."""
        with self._change:
            self._stop = True
            self._change.notify_all()
        for t in self._threads:
            t.join()
        for slot in self._slots:
            os.close(slot.fd)
        self._slots.clear()  # the memory goes with its last view, which an error's traceback may still hold
        self._free.clear()
        os.close(self.ready)
        os.close(self._wake)

    def _work(self) -> None:
        for shard, spans, loans in self._shards():
            try:
                passed = self._stream(shard, spans, loans)
            except _Stopped:
                return
            except ShardqError as e:
                passed = Passed(shard, None, e)
            except Exception as e:  # a bug; this thread has to say so, or the run would wait for ever
                logger.exception("streaming %s failed", shard.name)
                passed = Passed(shard, None, TaskFailed(f"streaming {shard.name}: {type(e).__name__}: {e}"))
            self._tell(passed)

    def _shards(self) -> Iterator["_Work"]:
        while True:
            with self._change:
                while not self._todo and not self._stop:
                    self._change.wait()
                if self._stop:
                    return
                work = self._todo.popleft()
            yield work

    def _stream(self, shard: Shard, spans: tuple[Span, ...], loans: tuple[Loan, ...]) -> Passed:
        """Bring all spans; the shard's hash, and the digests of what it lends, if it is the right one."""
        digest = self._hashes.new_digest()
        lent = {loan.pair: RangeDigest(loan) for loan in loans}
        with self._hashes.joined(), closing(self._open_file(shard.name, self._count)) as file:
            for span in spans:
                slot = self._slot()
                try:
                    origin = span.begin - span.begin % mmap.ALLOCATIONGRANULARITY  # alignment as in the file
                    with memoryview(slot.memory)[span.begin - origin : span.end - origin] as room:
                        file.read_into(span.begin, room)
                        for at in range(0, len(room), PIECE_BYTES):  # of what workers will find there, not of what came
                            self._hashes.update(digest, room[at : at + PIECE_BYTES])
                        for each in lent.values():
                            each.take(span.begin, room)
                except BaseException:
                    self.give_back(slot)
                    raise
                if span.bundles:
                    self._tell(Piece(span, slot, origin))
                else:
                    self.give_back(slot)
        found = digest.hexdigest()
        if shard.sha256 not in {None, found}:
            return Passed(shard, None, None)
        return Passed(shard, found, None, {pair: each.digest() for pair, each in lent.items()})

    def _slot(self) -> Slot:
        with self._change:
            while not self._free and not self._stop:
                self._change.wait()
            if self._stop:
                raise _Stopped
            return self._free.pop()

    def _count(self, count: int) -> None:
        if self._stop:
            raise _Stopped
        with self._change:
            self.moved_bytes += count

    def _tell(self, news: Piece | Passed) -> None:
        self._news.put(news)
        os.write(self._wake, b"x")


_Work = tuple[Shard, tuple[Span, ...], tuple[Loan, ...]]


class _Stopped(Exception):
    """Unwinds a download when the run stops."""


def _make_slot(size_bytes: int) -> Slot:
    make: Callable[[str], int] | None = getattr(os, "memfd_create", None)
    if make is None:
        raise BadOption("--stream needs Linux (memfd_create); leave it out to stage shards on disk")
    fd = -1
    try:
        fd = make("shardq-span")
        os.ftruncate(fd, size_bytes)
        return Slot(fd, f"/proc/{os.getpid()}/fd/{fd}", mmap.mmap(fd, size_bytes))
    except OSError as e:
        if fd >= 0:
            os.close(fd)
        raise BudgetTooSmall(
            f"--stream cannot have a piece of memory of {size_bytes / 1e6:.0f} MB: {e.strerror}; raise the limits of "
            "file size, open files and memory (ulimit), or leave it out to stage shards on disk"
        ) from e


def mismatch(shard: Shard, label: str, tries: int) -> ChecksumMismatch:
    """The error for a shard that came wrong every time."""
    return ChecksumMismatch(
        f"{label}, shard {shard.name}: what arrives does not have the sha256 that the Hub promises ({shard.sha256}), "
        f"{tries} times in a row; try another network, or report it to the owner of the repo"
    )
