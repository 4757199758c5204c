"""Rows of a weight as rows of a GGUF file: quantized into blocks of ggml, or stored as plain floats."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from shardq.arena import Arena
from shardq.block_tasks import FP32, BlocksTask, Take, Vector, VectorsTask
from shardq.dequantize.base import Encoded
from shardq.dequantize.decoding import code_rows
from shardq.errors import NonFiniteWeight, NotExact
from shardq.figures import FIGURES, Figures, merge_figures, sum_figures
from shardq.kernels import KernelSet
from shardq.layouts.stored import store
from shardq.schemes import BLOCKS
from shardq.vector_cache import VectorCache

MX_BYTES: Final = 17  # of a block of MXFP4: its exponent, then codes of columns j and j + 16
MX_COLUMNS: Final = 32
BF16_END: Final = np.float32((2 - 2**-8) * 2.0**127)  # from here on BF16 has infinity
ROOM_BYTES: Final = 1 << 19  # of the fp32 of rows that are made at once: source, blocks and they fit a level-2 cache
HALF_INFINITY: Final = 0x7C00  # exponent bits of fp16 that only NaN and infinity have
Extent = tuple[NDArray[np.uint8], int]  # bytes in memory, offset in the file


@dataclass(frozen=True, slots=True)
class Taking:
    """A take of a slab while it is made."""

    take: Take
    first: int  # position in the take of the slab's first row
    out: NDArray[np.uint8]  # [rows, bytes of one], in the weight's order
    stats: NDArray[np.float64]  # figures of each row
    held: NDArray[np.float32] | None  # of a turned one all its rows


@dataclass(frozen=True, slots=True)
class Given:
    """Some rows of a slab, as the worker's tiles have them."""

    row: int  # of the weight
    rows: NDArray[Any]
    dtype: str
    parts: Mapping[str, NDArray[Any]] | None  # what encoded ones are made of
    wide: NDArray[np.float32] | None = None  # encoded ones before they were rounded


class BlockRows:
    """What one output makes of a slab. Its arrays lie in the worker's arena."""

    def __init__(self, task: BlocksTask, arena: Arena, vectors: VectorCache, kernels: KernelSet) -> None:
        self.task = task
        self._vectors, self._kernels = vectors, kernels
        self._takings = [_taking(task, take, arena) for take in task.takes]
        self._room = arena.take((room_floats(task),), np.float32)

    def add(self, given: Given) -> None:
        """Make what becomes of some rows. Raises NonFiniteWeight, NotExact, BadImportance."""
        for t in self._takings:
            inside = t.take.within(given.row, given.row + len(given.rows))
            if not inside:
                continue
            lines = t.take.rows[inside.start : inside.stop]
            rows, dtype = given.rows, given.dtype
            if t.take.narrowed and given.wide is not None:
                rows, dtype = given.wide, "F32"
            picked = rows[lines.start - given.row : lines[-1] + 1 - given.row : lines.step]
            if t.take.column_order:
                picked = t.take.column_order.apply(picked, 1)
            there = slice(inside.start - t.first, inside.stop - t.first)
            if t.held is not None:
                self._kernels.widen(np.ascontiguousarray(picked), dtype, t.held[there])
            elif t.take.carried:
                self._carry(t, given, lines, there)
            else:
                self._fill(t.take, np.ascontiguousarray(picked), dtype, t.out[there], t.stats[there])

    def finish(self) -> Figures:
        """Make what needed all rows first. Returns the figures of all that is quantized."""
        for t in self._takings:
            if t.held is not None:
                self._fill(t.take, np.ascontiguousarray(t.held.T), "F32", t.out, t.stats)
        measured = [t.stats for t in self._takings if t.take.is_quantized]
        return merge_figures(sum_figures(stats, self._kernels) for stats in measured)

    def extents(self) -> Iterator[tuple[str, Extent]]:
        """File and bytes of all that was made."""
        for t in self._takings:
            for extent in extents(t.take, t.first, t.out):
                yield t.take.file, extent

    def _fill(
        self, take: Take, rows: NDArray[Any], dtype: str, out: NDArray[np.uint8], stats: NDArray[np.float64]
    ) -> None:
        if take.added:
            rows, dtype = _added(rows, dtype, take, self._kernels), "F32"
        vector = None if take.importance is None else self._vectors.get_raw(take.importance)
        group = BLOCKS[take.type].group_size if take.is_quantized else 0
        count = max(1, self._room.size // rows.shape[1])
        for at in range(0, len(rows), count):
            there = slice(at, at + count)
            some, blocks = rows[there], out[there]
            wide = self._room[: some.size].reshape(some.shape)
            kept, kind = (self._narrowed(some, dtype, take), "BF16") if take.narrowed else (some, dtype)
            if not take.is_quantized:
                blocks[...] = self._plain(kept, kind, take, wide)
                continue
            if self._kernels.quantize_blocks(kept, kind, take.type, vector, blocks):
                raise self._unfit(some, dtype, take)
            self._kernels.dequantize_blocks(blocks, take.type, wide)
            self._kernels.error_values(some, dtype, wide, group, stats[there])

    def _narrowed(self, rows: NDArray[Any], dtype: str, take: Take) -> NDArray[np.uint16]:
        """Rows as BF16."""
        wide = np.empty(rows.shape, np.float32)
        self._kernels.widen(rows, dtype, wide)
        if not (wide.min() > -BF16_END and wide.max() < BF16_END):  # a NaN is neither
            raise self._unfit(rows, dtype, take)
        return store(wide, np.dtype(np.uint16))

    def _plain(self, rows: NDArray[Any], dtype: str, take: Take, wide: NDArray[np.float32]) -> NDArray[np.uint8]:
        """Rows as plain floats, as bytes [rows, bytes of one]; `wide` is room for them in fp32."""
        self._kernels.widen(rows, dtype, wide)
        made: NDArray[Any] = wide
        if take.type == "F16":
            with np.errstate(over="ignore"):
                made = wide.astype(np.float16)
            finite = ((made.view(np.uint16) & HALF_INFINITY) != HALF_INFINITY).all()  # numpy's own takes far longer
        else:
            made = store(wide, np.dtype(np.uint16)) if take.type == "BF16" else wide
            finite = np.isfinite(wide).all()
        if not finite:
            raise self._unfit(rows, dtype, take)
        return made.view(np.uint8).reshape(len(rows), -1)

    def _carry(self, t: Taking, given: Given, lines: range, there: slice) -> None:
        """Codes of MXFP4 as they are; nothing is lost."""
        assert self.task.encoded
        assert given.parts
        assert lines.step == 1
        own = slice(lines.start - given.row, lines.stop - given.row)
        blocks = carry_blocks(self.task.encoded, given.parts, (given.row, given.row + len(given.rows)), self._kernels)
        t.out[there] = blocks[own]
        wide = np.empty((len(lines), self.task.columns), np.float32)
        self._kernels.dequantize_blocks(t.out[there], t.take.type, wide)
        rows = np.ascontiguousarray(given.rows[own])
        if not np.isfinite(wide).all():  # a scale at the end of its range: nothing quantizes it that would tell
            raise self._unfit(rows, given.dtype, t.take)
        self._kernels.error_values(rows, given.dtype, wide, MX_COLUMNS, t.stats[there])

    def _unfit(self, rows: NDArray[Any], dtype: str, take: Take) -> NonFiniteWeight:
        task = self.task
        wide = np.empty(rows.shape, np.float32)
        self._kernels.widen(rows, dtype, wide)
        bad = np.argwhere(~np.isfinite(wide))
        value = wide[tuple(bad[0])] if len(bad) else np.abs(wide).max()
        return NonFiniteWeight(
            f"{task.tensor} in {task.shard} holds {value} in rows {task.row} to {task.end_row}, which become "
            f"{take.tensor} in {take.type}: expected finite weights that it can hold; the checkpoint may be damaged"
        )


def fill_vector(vector: Vector, data: NDArray[Any], take: Take, kernels: KernelSet, shard: str) -> NDArray[np.uint8]:
    """The fp32 bytes of a take of a vector, in its order; `data` as kernels take it. What fp16 becomes is rounded to
    fp16, as llama.cpp's converter does. An exponential is rounded to the nearest; torch 2.13.0 with MKL has the number
    beside it for one in a hundred. Raises NonFiniteWeight."""
    wide = np.empty((1, vector.count), np.float32)
    kernels.widen(data.reshape(1, -1), vector.dtype, wide)
    made = wide[0, take.rows.start : take.rows.stop : take.rows.step] + np.float32(take.added)
    with np.errstate(over="ignore"):
        if take.negative_exp:
            made = -np.exp(made.astype(np.float64)).astype(np.float32)
        if vector.dtype == "F16" and (take.added or take.negative_exp):
            made = made.astype(np.float16).astype(np.float32)
    if not np.isfinite(made).all():
        raise NonFiniteWeight(
            f"{vector.tensor} in {shard} holds NaN or infinity: expected finite numbers for {take.tensor}; the "
            "checkpoint may be damaged"
        )
    return np.ascontiguousarray(made).view(np.uint8).reshape(-1, 4)


def carry_blocks(
    e: Encoded, parts: Mapping[str, NDArray[Any]], rows: tuple[int, int], kernels: KernelSet
) -> NDArray[np.uint8]:
    """Rows of MXFP4 codes of a source as ggml's blocks [rows, bytes]. Raises NotExact for scales that are none."""
    first, behind = e.stored_range(*rows)
    step = 1 if e.pick is None else e.pick[2]
    coded = code_rows(replace(e, rows=behind - first, pick=(first, behind, 1)), parts, 0, behind - first, kernels)
    assert coded is not None
    scales, codes = coded.values.scales[::step], coded.values.codes[::step]
    if not (np.isfinite(scales).all() and (scales > 0).all()):
        raise NotExact(f"{e.name} in {e.parts[0].shard} has scales that are NaN: expected powers of two; it is damaged")
    pairs = codes.reshape(len(codes), -1, 2, MX_COLUMNS // 2)
    blocks = np.empty((*pairs.shape[:2], MX_BYTES), np.uint8)
    blocks[..., 0] = store(np.ascontiguousarray(scales), np.dtype(np.uint8))
    blocks[..., 1:] = pairs[:, :, 0] | pairs[:, :, 1] << 4
    return blocks.reshape(len(codes), -1)


def extents(take: Take, first: int, out: NDArray[np.uint8]) -> Iterator[Extent]:
    """The runs of bytes of rows of a take, from its position `first` on: one, but where rows are re-ordered."""
    size = out.shape[1]
    if take.order:
        out = out[np.argsort(take.order.places(first, first + len(out)))]
    at = 0
    for place, count in _runs(take, first, len(out)):
        yield out[at : at + count].reshape(-1), take.begin + place * size
        at += count


def _runs(take: Take, first: int, count: int) -> Iterator[tuple[int, int]]:
    """Place in the matrix and number of rows of each run that so many rows of a take become, in the matrix's order."""
    if not take.order:
        yield 0 if take.turned else first, count
        return
    places = np.sort(take.order.places(first, first + count))
    breaks = np.flatnonzero(np.diff(places) != 1) + 1
    for begin, end in zip((0, *breaks), (*breaks, count), strict=True):
        yield int(places[begin]), int(end - begin)


def written_extents(task: BlocksTask | VectorsTask) -> Iterator[tuple[str, int, int]]:
    """File, first byte and size of each of the extents that a task writes, in order."""
    if isinstance(task, VectorsTask):
        for take in (take for v in task.vectors for take in v.takes):
            yield from _places_of(take, 0, len(take.rows), take.row_bytes(1))
        return
    for take in task.takes:
        first, count = take.within(task.row, task.end_row).start, len(take.within(task.row, task.end_row))
        yield from _places_of(take, first, task.columns if take.turned else count, take.row_bytes(task.columns))


def _places_of(take: Take, first: int, count: int, size: int) -> Iterator[tuple[str, int, int]]:
    for place, rows in _runs(take, first, count):
        yield take.file, take.begin + place * size, rows * size


def room_floats(task: BlocksTask) -> int:
    """Numbers of the rows that are made at once: as many as ROOM_BYTES holds, at least one."""
    sizes = [(task.columns, len(t.rows)) if t.turned else (task.end_row - task.row, task.columns) for t in task.takes]
    return max((min(rows, max(1, ROOM_BYTES // FP32 // columns)) * columns for rows, columns in sizes), default=0)


def shapes(task: BlocksTask) -> list[tuple[tuple[int, ...], type]]:
    """The arrays that `BlockRows` takes from an arena: all but temporaries of rows that are kept or carried."""
    found: list[tuple[tuple[int, ...], type]] = [((room_floats(task),), np.float32)]
    for take in task.takes:
        rows = task.columns if take.turned else len(take.within(task.row, task.end_row))
        found += [((rows, take.row_bytes(task.columns)), np.uint8), ((rows, FIGURES), np.float64)]
        if take.turned:
            found.append(((len(take.rows), task.columns), np.float32))
    return found


def _taking(task: BlocksTask, take: Take, arena: Arena) -> Taking:
    rows = task.columns if take.turned else len(take.within(task.row, task.end_row))
    out = arena.take((rows, take.row_bytes(task.columns)), np.uint8)
    stats = arena.take((rows, FIGURES), np.float64)
    held = arena.take((len(take.rows), task.columns), np.float32) if take.turned else None
    return Taking(take, take.within(task.row, task.end_row).start, out, stats, held)


def _added(rows: NDArray[Any], dtype: str, take: Take, kernels: KernelSet) -> NDArray[np.float32]:
    wide = np.empty(rows.shape, np.float32)
    kernels.widen(rows, dtype, wide)
    wide += np.float32(take.added)
    return wide
