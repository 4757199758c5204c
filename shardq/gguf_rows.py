"""The bytes of a GGUF file that some rows of a weight become, derived from a source that is read by ranges. They are
made by what makes them in a worker; how rows are cut changes none of them."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from shardq.arena import Arena, reserve
from shardq.block_rows import BlockRows, Extent, Given, extents, fill_vector, shapes, written_extents
from shardq.block_tasks import BlocksTask, Take, Vector, VectorsTask
from shardq.checkpoint import TensorRef
from shardq.dequantize.base import Encoded
from shardq.figures import Figures
from shardq.kernels import KernelSet
from shardq.ledger import Errors
from shardq.making import WEIGHT_ARRAYS
from shardq.plans import OutputFile, Plan
from shardq.source_rows import WINDOW_BYTES, SourceRows, deriving, encoded_reads
from shardq.sources.base import Source
from shardq.vector_cache import VectorCache
from shardq.weights import Weights

SLAB_BYTES: Final = 16 << 20  # of rows that are derived at once, as 16 bits
DECODED_BYTES: Final = 4  # of a number of encoded rows

Span = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Made:
    """One weight and all that becomes of it. A vector is a single row."""

    tensor: TensorRef
    work: BlocksTask | Vector  # over all rows

    @property
    def rows(self) -> int:
        """How many there are to choose from."""
        return self.work.rows if isinstance(self.work, BlocksTask) else 1

    @property
    def takes(self) -> tuple[Take, ...]:
        """All parts of the file that have something of it."""
        return self.work.takes

    @property
    def encoded(self) -> Encoded | None:
        """How its rows are made."""
        return self.tensor.encoded[0] if isinstance(self.work, BlocksTask) and self.tensor.encoded else None

    def snap(self, row: int, end_row: int) -> Span:
        """Rows widened, so that no run is cut whose rows change places, and nothing that is turned."""
        if isinstance(self.work, Vector):
            return row, end_row
        while True:
            wide = [(row, end_row), *(_whole(t, row, end_row) for t in self.takes if t.turned or t.order)]
            found = min(first for first, _ in wide), max(behind for _, behind in wide)
            if found == (row, end_row):
                return found
            row, end_row = found

    def slabs(self, row: int, end_row: int) -> Iterator[Span]:
        """Snapped rows in order, as many as are derived at once."""
        step = max(1, SLAB_BYTES // (2 * self.work.columns)) if isinstance(self.work, BlocksTask) else 1
        while row < end_row:
            yield (slab := self.snap(row, min(end_row, row + step)))
            row = slab[1]

    def windows(self, row: int, end_row: int) -> Iterator[Span]:
        """Rows of a slab that are read at once."""
        assert isinstance(self.work, BlocksTask)
        row_bytes = DECODED_BYTES * self.work.columns if self.work.encoded else self.work.row_bytes
        step = max(1, WINDOW_BYTES // row_bytes)
        yield from ((at, min(end_row, at + step)) for at in range(row, end_row, step))

    def source_reads(self, row: int, end_row: int) -> Iterator[Span]:
        """What is read of the source for some rows, each range at once."""
        if isinstance(self.work, Vector):
            yield self.work.begin, self.work.begin + self.work.size_bytes
            return
        windows = [w for slab in self.slabs(row, end_row) for w in self.windows(*slab)]
        if e := self.encoded:
            yield from encoded_reads(e, (0, e.columns), windows)
            return
        begin, size = self.tensor.begin, self.work.row_bytes
        yield from ((begin + first * size, begin + behind * size) for first, behind in windows)

    def part(self, row: int, end_row: int) -> BlocksTask:
        """The work of some rows."""
        assert isinstance(self.work, BlocksTask)
        inside = tuple(t for t in self.takes if t.within(row, end_row))
        return replace(self.work, row=row, end_row=end_row, takes=inside)

    def output_bytes(self, row: int, end_row: int) -> Iterator[int]:
        """Bytes of each run of the output that snapped rows become."""
        if isinstance(self.work, Vector):
            yield from (len(t.rows) * t.row_bytes(1) for t in self.takes)
            return
        for slab in self.slabs(row, end_row):
            yield from (size for _, _, size in written_extents(self.part(*slab)))


def find_made(plan: Plan) -> dict[str, Made]:
    """All weights of a plan of which something becomes, in its order."""
    return made_by(plan.tasks, plan.weights)


def made_by(tasks: Iterable[object], weights: Weights) -> dict[str, Made]:
    """Likewise of those tasks that make GGUF files; `weights` are all that there are."""
    works: dict[str, BlocksTask | Vector] = {}
    for task in tasks:
        if isinstance(task, VectorsTask):
            works |= {v.tensor: v for v in task.vectors}
        elif isinstance(task, BlocksTask) and task.takes:
            before = works.get(task.tensor)
            takes = tuple(dict.fromkeys((*(before.takes if before else ()), *task.takes)))
            works[task.tensor] = replace(task, row=0, end_row=task.rows, takes=takes)
    return {name: Made(t, works[name]) for name, t in weights.tensors.items() if name in works}


class DerivedRows:
    """Of one weight. Memory: a slab with what it becomes, and a window of the source with what it decodes to; of codes
    that lie in columns all of them."""

    def __init__(self, made: Made, rounded: bool, source: Source, kernels: KernelSet) -> None:
        """`rounded` as of SourceRows."""
        self._made, self._source, self._kernels = made, source, kernels
        self._arena, self._vectors = Arena(), VectorCache()
        is_vector = isinstance(made.work, Vector)
        rounded = rounded and not any(take.narrowed for take in made.work.takes)  # from fp32, and so once
        self._rows = None if is_vector else SourceRows(made.tensor, made.encoded, rounded, source, kernels)

    def derive(self, row: int, end_row: int) -> tuple[list[tuple[str, Extent]], Errors]:
        """File, bytes and place of all that a slab's rows become, valid until the next call; and the errors of what is
        in blocks. Raises NoRowsError for what cannot be quantized, BadImportance, and what reading raises."""
        if self._rows is None:
            return list(self._derive_vector()), Errors(Figures(), 0)
        task = self._made.part(row, end_row)
        self._arena.reset(reserve(*shapes(task)))
        made = BlockRows(task, self._arena, self._vectors, self._kernels)
        for first, behind in self._made.windows(row, end_row):
            rows, dtype = self._rows.taken(first, behind)
            parts = self._rows.stored(first, behind) if any(t.carried for t in task.takes) else None
            with deriving():
                made.add(Given(first, rows, dtype, parts))
        with deriving():
            figures = made.finish()
        return list(made.extents()), Errors(figures, task.measured_weights)

    def _derive_vector(self) -> Iterator[tuple[str, Extent]]:
        vector, shard = self._made.work, self._made.tensor.shard
        assert isinstance(vector, Vector)
        raw = self._source.read(shard, vector.begin, vector.begin + vector.size_bytes)
        data: NDArray[Any] = np.frombuffer(raw, WEIGHT_ARRAYS[vector.dtype])
        for take in vector.takes:
            with deriving():
                out = fill_vector(vector, data, take, self._kernels, shard)
            yield from ((take.file, extent) for extent in extents(take, 0, out))


@dataclass(frozen=True, slots=True)
class Difference:
    """The bytes of a result that were compared, and the first that is not as derived."""

    bytes_compared: int
    problem: str | None


def compare_extent(result: Source, file: OutputFile, data: NDArray[np.uint8], offset: int) -> Difference:
    """Bytes that should be in a file at `offset`, with those that are. Raises what reading raises."""
    for at in range(0, data.size, WINDOW_BYTES):
        expected = data[at : at + WINDOW_BYTES]
        found = np.frombuffer(result.read(file.name, offset + at, offset + at + expected.size), np.uint8)
        if not np.array_equal(found, expected):
            bad = int((found != expected).argmax())
            place = offset + at + bad
            return Difference(
                at + expected.size,
                f"{_where(file, place)} differs at byte {place} of the file: expected {int(expected[bad]):#04x}, "
                f"found {int(found[bad]):#04x}",
            )
    return Difference(data.size, None)


def compare_fixed(result: Source, file: OutputFile) -> Difference:
    """The header of a file, and what the config alone decides, with what a result has."""
    compared = 0
    for offset, data in ((0, file.header), *file.fixed):
        found = compare_extent(result, file, np.frombuffer(data, np.uint8), offset)
        compared += found.bytes_compared
        if found.problem:
            return Difference(compared, found.problem)
    return Difference(compared, None)


def by_name(plan: Plan) -> Mapping[str, OutputFile]:
    """The files of a plan."""
    return {f.name: f for f in plan.files}


def _where(file: OutputFile, place: int) -> str:
    name = next((n for n, (begin, end) in file.offsets.items() if begin <= place < end), "its header")
    return f"{name} in {file.name}"


def _whole(take: Take, row: int, end_row: int) -> Span:
    """The rows of all that must stay together of what a take has of some rows."""
    inside = take.within(row, end_row)
    if not inside:
        return row, end_row
    size = take.order.run if take.order else len(take.rows)
    first, behind = inside.start // size * size, -(-inside.stop // size) * size
    return min(row, take.rows[first]), max(end_row, take.rows[behind - 1] + 1)
