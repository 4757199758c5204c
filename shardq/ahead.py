"""Reads tensors of remote shards ahead, only to find their largest magnitudes: for range mode, where a fused group's
members may lie in pieces that are not in memory together."""

import logging
import os
import queue
import threading
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from shardq.checkpoint import TensorRef
from shardq.errors import ShardqError, TaskFailed
from shardq.sources.base import Source
from shardq.tasks import TILE_BYTES

logger = logging.getLogger(__name__)
WINDOW_BYTES = 8 * TILE_BYTES


@dataclass(frozen=True, slots=True)
class Seen:
    """A tensor's largest magnitude, or the reason why it is not known."""

    tensor: str
    amax: float
    error: ShardqError | None


class AheadReader:
    """One thread. `ready` is a descriptor that becomes readable when there is something to take."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self.fetched_bytes = 0
        self._stop = False
        self._todo: queue.SimpleQueue[TensorRef | None] = queue.SimpleQueue()
        self._news: queue.SimpleQueue[Seen] = queue.SimpleQueue()
        self.ready, self._wake = os.pipe()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def start(self, tensor: TensorRef) -> None:
        """Queue a tensor."""
        self._todo.put(tensor)

    def take(self) -> list[Seen]:
        """What has been read since the last call."""
        news: list[Seen] = []
        while not self._news.empty():
            news.append(self._news.get())
            os.read(self.ready, 1)
        return news

    def close(self) -> None:
        """Stop, and wait for a running read to notice."""
        self._stop = True
        self._todo.put(None)
        self._thread.join()
        os.close(self.ready)
        os.close(self._wake)

    def _count(self, count: int) -> None:
        if self._stop:
            raise _Stopped
        self.fetched_bytes += count

    def _work(self) -> None:
        while (tensor := self._todo.get()) is not None and not self._stop:
            try:
                seen = Seen(tensor.name, self._read(tensor), None)
            except ShardqError as e:
                seen = Seen(tensor.name, 0.0, e)
            except _Stopped:
                return
            except Exception as e:  # a bug; this thread has to say so, or the run would wait for ever
                logger.exception("reading %s ahead failed", tensor.name)
                seen = Seen(tensor.name, 0.0, TaskFailed(f"reading {tensor.name} ahead: {type(e).__name__}: {e}"))
            self._news.put(seen)
            os.write(self._wake, b"x")

    def _read(self, t: TensorRef) -> float:
        import numpy as np  # only such runs pay for it

        from shardq.kernels import load
        from shardq.worker import WEIGHT_ARRAYS

        assert t.dtype is not None
        assert t.shape is not None
        rows, columns = t.shape
        row_bytes, step = t.size_bytes // rows, window_rows(t)
        room = np.empty(min(rows, step) * row_bytes, np.uint8)
        found = np.empty((min(rows, step), 1), np.float32)
        kernels, amax = load(), 0.0
        with closing(self._source.open_file(t.shard, self._count)) as file:
            for row in range(0, rows, step):
                count = min(step, rows - row)
                part = room[: count * row_bytes]
                file.read_into(t.begin + row * row_bytes, part.data)
                tile: Any = part.view(WEIGHT_ARRAYS[t.dtype]).reshape(count, columns)
                kernels.group_absmax(tile, t.dtype, columns, found[:count])
                amax = max(amax, float(found[:count].max()))
        return amax


def window_rows(t: TensorRef) -> int:
    """Rows that are asked for at once."""
    assert t.shape is not None
    return max(1, WINDOW_BYTES // (t.size_bytes // t.shape[0]))


def count_windows(t: TensorRef) -> int:
    """Requests that reading a tensor ahead takes."""
    assert t.shape is not None
    return -(-t.shape[0] // window_rows(t))


class _Stopped(Exception):
    """Unwinds a read when the run stops."""
