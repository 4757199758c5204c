"""Fetches remote shards into the staging folder on background threads. How many at a time is the caller's decision."""

import logging
import os
import queue
import threading
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from shardq.checkpoint import Shard
from shardq.errors import ShardqError, TaskFailed
from shardq.files.atomic import writing
from shardq.sources.base import Source

logger = logging.getLogger(__name__)
THREADS: Final = 2


@dataclass(frozen=True, slots=True)
class Fetched:
    """A shard that has arrived, or the reason why it has not."""

    shard: Shard
    sha256: str | None
    error: ShardqError | None


class Fetcher:
    """Downloads shards in order. `ready` is a descriptor that becomes readable on arrival."""

    def __init__(self, source: Source, folder: Path) -> None:
        """Begin, with nothing to do."""
        self._source, self._folder = source, folder
        self.fetched_bytes = 0  # so far, over all shards
        self._todo: deque[Shard] = deque()
        self._change = threading.Condition()
        self._stop = False
        self._arrived: queue.SimpleQueue[Fetched] = queue.SimpleQueue()
        self.ready, self._wake = os.pipe()
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(THREADS)]
        for t in self._threads:
            t.start()

    def start(self, shard: Shard) -> None:
        """Queue a shard."""
        with self._change:
            self._todo.append(shard)
            self._change.notify()

    def take(self) -> list[Fetched]:
        """What has arrived since the last call."""
        arrived: list[Fetched] = []
        while not self._arrived.empty():
            arrived.append(self._arrived.get())
            os.read(self.ready, 1)
        return arrived

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
            while not self._todo and not self._stop:
                self._change.wait()
            return None if self._stop else self._todo.popleft()

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
