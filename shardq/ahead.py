"""Reads tensors of remote shards ahead, only to find their largest magnitudes: for range mode, where a fused group's
members may lie in pieces that are not in memory together."""

from contextlib import ExitStack, closing
from dataclasses import dataclass
from math import inf
from typing import TYPE_CHECKING, Any, Final

from shardq.background import Background
from shardq.checkpoint import TensorRef
from shardq.errors import CorruptShard, NonFiniteWeight, NotExact, ShardqError
from shardq.matrix_rows import DECODING_BYTES
from shardq.sources.base import Source
from shardq.tasks import TILE_BYTES

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from shardq.carry import Goal
    from shardq.dequantize.base import Encoded, Part
    from shardq.dequantize.decoding import Ranges
    from shardq.kernels import KernelSet
    from shardq.sources.base import FileReader

WINDOW_BYTES = 8 * TILE_BYTES
CODES: Final = "codes"
Extent = tuple[str, int, int]  # a shard, the first byte, the one behind the last


@dataclass(frozen=True, slots=True)
class Seen:
    """A tensor's largest magnitude, or the reason why it is not known."""

    tensor: str
    amax: float
    error: ShardqError | None


class AheadReader(Background[TensorRef, Seen]):
    """One thread that reads whole tensors in windows and keeps only their magnitudes."""

    def __init__(self, source: Source, rounds: bool, goals: "Mapping[str, Goal]") -> None:
        """Begin, with nothing to do. `rounds` and `goals` of encoded tensors: as of OnePass."""
        self._source, self._rounds, self._goals = source, rounds, goals
        super().__init__(
            lambda t: Seen(t.name, self._read(t), None),
            lambda t, error: Seen(t.name, 0.0, error),
            lambda t: f"reading {t.name} ahead",
        )

    def _read(self, t: TensorRef) -> float:
        from shardq.kernels import load  # only such runs pay for it

        kernels = load()
        with ExitStack() as held:
            shards = dict.fromkeys(shard for shard, _, _ in ahead_extents(t))
            files = {s: held.enter_context(closing(self._source.open_file(s, self.count))) for s in shards}
            return self._decode(t, files, kernels) if t.encoded else self._measure(t, files[t.shard], kernels)

    def _measure(self, t: TensorRef, file: "FileReader", kernels: "KernelSet") -> float:
        """Of a tensor that is stored as it is."""
        import numpy as np

        from shardq.making import WEIGHT_ARRAYS

        assert t.dtype is not None
        assert t.shape is not None
        rows, columns = t.shape
        step, amax = min(rows, window_rows(t)), 0.0
        room, found = np.empty(step * (t.size_bytes // rows), np.uint8), np.empty((step, 1), np.float32)
        for _, begin, end in ahead_extents(t):
            part = room[: end - begin]
            file.read_into(begin, part.data)
            tile: Any = part.view(WEIGHT_ARRAYS[t.dtype]).reshape(-1, columns)
            kernels.group_absmax(tile, t.dtype, columns, found[: len(tile)])
            amax = max(amax, float(found[: len(tile)].max()))
        return amax

    def _decode(self, t: TensorRef, files: "Mapping[str, FileReader]", kernels: "KernelSet") -> float:
        """Of a tensor that is encoded; infinite where that cannot be decoded: the tasks over it say what is wrong."""
        (e,) = t.encoded
        held = {p.role: _Held(files[p.shard], *p.extent(*e.stored_range(0, e.rows))) for p in e.parts[1:]}
        step, amax = window_rows(t), 0.0
        for row in range(0, e.rows, step):
            end_row = min(e.rows, row + step)
            held[CODES] = _Held(files[t.shard], *e.codes_extent(row, end_row))
            try:
                amax = max(amax, self._largest(t, e, (row, end_row), held, kernels))
            except (CorruptShard, NonFiniteWeight, NotExact):
                return inf
        return amax

    def _largest(
        self, t: TensorRef, e: "Encoded", rows: tuple[int, int], held: "Mapping[str, _Held]", kernels: "KernelSet"
    ) -> float:
        """Of some rows, tile by tile, as a worker finds it."""
        import numpy as np

        from shardq.carry_codes import largest_scale
        from shardq.decoded import DecodedRows, round_rows

        assert t.dtype is not None
        goal, step, amax = self._goals.get(t.name), tile_rows(e), 0.0
        wide, found = np.empty((step, e.columns), np.float32), np.empty((step, 1), np.float32)
        decoded = DecodedRows(e, rows, lambda p, ranges: held[p.role].read(p, ranges), kernels, checked=False)
        for row in range(*rows, step):
            end_row = min(rows[1], row + step)
            tile, parts = decoded.tile(row, end_row, wide)
            if goal:
                amax = max(amax, largest_scale(e, parts, row, end_row, goal, kernels))
                continue
            kept: Any = round_rows(tile, t.dtype) if self._rounds else tile
            kernels.group_absmax(kept, t.dtype if self._rounds else "F32", e.columns, found[: len(tile)])
            amax = max(amax, float(found[: len(tile)].max()))
        return amax


class _Held:
    """Consecutive bytes of a file, read at once."""

    def __init__(self, file: "FileReader", begin: int, end: int) -> None:
        import numpy as np

        self._begin, self._data = begin, np.empty(end - begin, np.uint8)
        if end > begin:
            file.read_into(begin, self._data.data)

    def read(self, part: "Part", ranges: "Ranges") -> "NDArray[Any]":
        """As `read_parts` wants it."""
        import numpy as np

        del part
        return np.concatenate([self._data[begin - self._begin : end - self._begin] for begin, end in ranges])


def window_rows(t: TensorRef) -> int:
    """Rows that are asked for at once; all of them where each stored line has some of every row."""
    assert t.shape is not None
    if not t.encoded:
        return max(1, WINDOW_BYTES // (t.size_bytes // t.shape[0]))
    (e,) = t.encoded
    if e.is_strided:
        return e.rows
    begin, end = e.codes_extent(0, e.rows)
    tile = tile_rows(e)
    return max(tile, WINDOW_BYTES * e.rows // (end - begin) // tile * tile)


def tile_rows(e: "Encoded") -> int:
    """Rows that are decoded at once."""
    return max(1, TILE_BYTES // (4 * e.columns))


def ahead_extents(t: TensorRef) -> list[Extent]:
    """What reading a tensor ahead asks for, one request each."""
    assert t.shape is not None
    rows, step = t.shape[0], window_rows(t)
    if not t.encoded:
        size = t.size_bytes // rows
        return [(t.shard, t.begin + r * size, t.begin + min(rows, r + step) * size) for r in range(0, rows, step)]
    (e,) = t.encoded
    beside = [(p.shard, *p.extent(*e.stored_range(0, e.rows))) for p in e.parts[1:]]
    codes = [(t.shard, *e.codes_extent(r, min(rows, r + step))) for r in range(0, rows, step)]
    return [extent for extent in (*beside, *codes) if extent[1] < extent[2]]


def ahead_memory_bytes(t: TensorRef) -> int:
    """What that holds at a time; of a tensor along lines all that is stored, twice."""
    if not t.encoded:
        return WINDOW_BYTES
    (e,) = t.encoded
    largest = max(end - begin for _, begin, end in ahead_extents(t))
    beside = sum(p.window_bytes(*e.stored_range(0, e.rows)) for p in e.parts[1:])
    tile = min(e.rows, tile_rows(e))
    return 2 * (largest + beside) + (DECODING_BYTES + 4) * tile * e.columns
