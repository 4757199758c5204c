"""Reads tensors of remote shards ahead, only to find their largest magnitudes: for range mode, where a fused group's
members may lie in pieces that are not in memory together."""

from contextlib import closing
from dataclasses import dataclass
from typing import Any

from shardq.background import Background
from shardq.checkpoint import TensorRef
from shardq.errors import ShardqError
from shardq.sources.base import Source
from shardq.tasks import TILE_BYTES

WINDOW_BYTES = 8 * TILE_BYTES


@dataclass(frozen=True, slots=True)
class Seen:
    """A tensor's largest magnitude, or the reason why it is not known."""

    tensor: str
    amax: float
    error: ShardqError | None


class AheadReader(Background[TensorRef, Seen]):
    """One thread that reads whole tensors in windows and keeps only their magnitudes."""

    def __init__(self, source: Source) -> None:
        """Begin, with nothing to do."""
        self._source = source
        super().__init__(
            lambda t: Seen(t.name, self._read(t), None),
            lambda t, error: Seen(t.name, 0.0, error),
            lambda t: f"reading {t.name} ahead",
        )

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
        with closing(self._source.open_file(t.shard, self.count)) as file:
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
