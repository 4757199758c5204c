"""Cuts source shards into units of work. The cut depends on the headers alone, never on what is made of the weights, so
that several outputs can share one read, and an interrupted output can be finished in other company."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from shardq.checkpoint import TensorRef
from shardq.formats import WEIGHT_DTYPES
from shardq.tasks import SLAB_BYTES, SPAN_BYTES, TILE_BYTES

ROWS: Final = 128  # a slab ends at a multiple: no layout's words and no scales that rows share are cut
COPY_PIECES: Final = 64  # small tensors in one unit; keeps a task's message small


@dataclass(frozen=True, slots=True)
class Part:
    """Consecutive bytes of one tensor: whole rows of a matrix, or any bytes of another one. Of an encoded matrix those
    from the first to the last that hold codes of the rows."""

    tensor: TensorRef
    begin: int  # in the source shard
    size_bytes: int
    rows: tuple[int, int] | None  # the first row, the row behind the last; None: no matrix
    index: int = 0  # which of the tensor's encoded matrices

    @property
    def strip_bytes(self) -> int:
        """See tasks.Piece."""
        if self.rows is None:
            return TILE_BYTES
        row_bytes = self.size_bytes // (self.rows[1] - self.rows[0])
        rows = next(r for r in (32, 16, 8, 4, 2, 1) if r * row_bytes <= TILE_BYTES or r == 1)
        return rows * row_bytes


def cut_shard(tensors: Iterable[TensorRef]) -> list[tuple[Part, ...]]:
    """The units of one shard, largest first, so that no giant is left for the end: one slab of a matrix, or some small
    tensors, which all lie in one window of SPAN_BYTES, so that range mode can bring them in one piece."""
    units = list(_units(sorted(tensors, key=lambda t: t.begin)))
    return sorted(units, key=lambda unit: sum(p.size_bytes for p in unit), reverse=True)


def slabs(t: TensorRef) -> Iterator[Part]:
    """A tensor in parts no larger than a slab, in order; none of an empty one."""
    if t.encoded:
        yield from _encoded_slabs(t)
        return
    if not is_matrix(t):
        for at in range(0, t.size_bytes, SLAB_BYTES):
            yield Part(t, t.begin + at, min(SLAB_BYTES, t.size_bytes - at), None)
        return
    assert t.shape is not None
    rows, row_bytes = t.shape[0], t.size_bytes // t.shape[0]
    step = max(1, SLAB_BYTES // row_bytes // ROWS) * ROWS
    for row in range(0, rows, step):
        end = min(rows, row + step)
        yield Part(t, t.begin + row * row_bytes, (end - row) * row_bytes, (row, end))


def _encoded_slabs(t: TensorRef) -> Iterator[Part]:
    """Rows that take a slab once they are decoded to 16 bits: what is written of them counts, too."""
    for index, e in enumerate(t.encoded):
        step = max(1, SLAB_BYTES // (2 * e.columns) // ROWS) * ROWS
        for row in range(0, e.rows, step):
            rows = row, min(e.rows, row + step)
            begin, end = e.codes_extent(*rows)
            yield Part(t, begin, end - begin, rows, index)


def is_matrix(t: TensorRef) -> bool:
    """True for what a kernel can read as rows and columns."""
    return t.shape is not None and len(t.shape) == 2 and t.size_bytes > 0 and t.dtype in WEIGHT_DTYPES


def _units(tensors: Iterable[TensorRef]) -> Iterator[tuple[Part, ...]]:
    window = 0  # where the present one begins
    batch: list[Part] = []
    for part in (p for t in tensors for p in slabs(t)):
        apart = part.begin + part.size_bytes - window > SPAN_BYTES
        if batch and (apart or len(batch) == COPY_PIECES):
            yield tuple(batch)
            batch = []
        if apart:
            window = part.begin
        if part.rows:
            yield (part,)
        else:
            batch.append(part)
    if batch:
        yield tuple(batch)
