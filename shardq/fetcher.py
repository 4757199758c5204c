"""Fetches remote shards ahead of the workers, a few at a time, under a cap on staged bytes."""

import logging
import os
import queue
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from shardq.checkpoint import Shard
from shardq.errors import ShardqError, TaskFailed
from shardq.files.atomic import writing
from shardq.sources.base import Source

logger = logging.getLogger(__name__)
AHEAD: Final = 3  # shards staged or on their way at a time, without a disk cap
THREADS: Final = 2


@dataclass(frozen=True, slots=True)
class Fetched:
    """A shard that has arrived, or the reason why it has not."""

    shard: Shard
    sha256: str | None
    error: ShardqError | None


class Fetcher:
    """Downloads shards in order on background threads. `ready` is a descriptor that becomes readable on arrival."""

    def __init__(
        self, source: Source, folder: Path, shards: Sequence[Shard], staged: Sequence[Shard], cap_bytes: int | None
    ) -> None:
        """Begin. `staged` are shards that an earlier run left: they count until they are freed."""
        self._source, self._folder = source, folder
        self.fetched_bytes = 0  # so far, over all shards
        self._todo = list(reversed(shards))
        self._cap = cap_bytes
        self._staged = {s.name: s.size_bytes for s in staged}  # here (from an earlier run) or on their way
        self._change = threading.Condition()
        self._stop = False
        self._arrived: queue.SimpleQueue[Fetched] = queue.SimpleQueue()
        self.ready, self._wake = os.pipe()
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(min(THREADS, len(shards)))]
        for t in self._threads:
            t.start()

    def take(self) -> list[Fetched]:
        """What has arrived since the last call."""
        arrived: list[Fetched] = []
        while not self._arrived.empty():
            arrived.append(self._arrived.get())
            os.read(self.ready, 1)
        return arrived

    def free(self, shard: Shard) -> None:
        """Tell that a staged shard was deleted."""
        with self._change:
            del self._staged[shard.name]
            self._change.notify_all()

    def close(self) -> None:
        """Start no more downloads and wait for the running ones to notice."""
        with self._change:
            self._stop = True
            self._change.notify_all()
        for t in self._threads:
            t.join()
        os.close(self.ready)
        os.close(self._wake)

    def _next(self) -> Shard | None:
        with self._change:
            while not self._stop and self._todo:
                size = self._todo[-1].size_bytes
                fits = self._cap is None or sum(self._staged.values()) + size <= self._cap
                if not self._staged or (len(self._staged) < AHEAD and fits):
                    shard = self._todo.pop()
                    self._staged[shard.name] = size
                    return shard
                self._change.wait()
        return None

    def _count(self, count: int) -> None:
        if self._stop:
            raise _Stopped
        with self._change:
            self.fetched_bytes += count

    def _work(self) -> None:
        while (shard := self._next()) is not None:
            target = self._folder / shard.name
            try:
                with writing(target):
                    target.parent.mkdir(parents=True, exist_ok=True)
                sha256 = self._source.fetch(shard.name, target, self._count)
                got = Fetched(shard, sha256, None)
            except ShardqError as e:
                got = Fetched(shard, None, e)
            except _Stopped:
                return
            except Exception as e:  # a bug; this thread has to say so, or the run would wait for ever
                logger.exception("fetching %s failed", shard.name)
                got = Fetched(shard, None, TaskFailed(f"fetching {shard.name}: {type(e).__name__}: {e}"))
            self._arrived.put(got)
            os.write(self._wake, b"x")


class _Stopped(Exception):
    """Unwinds a download when the run stops."""
