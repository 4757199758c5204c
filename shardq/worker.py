"""Worker: turns one task into bytes at planned offsets of an output file. numpy and native kernels only.

Inputs and outputs are files; only the small records of `tasks` cross the process border. Memory is one arena that is
reused from task to task, because fresh pages cost more than the arithmetic.
"""

import math
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial, reduce
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from shardq import seldom
from shardq.arena import Arena, reserve
from shardq.block_tasks import BlocksTask, VectorsTask
from shardq.descriptors import Descriptors
from shardq.errors import CorruptShard, KernelUnavailable, NonFiniteWeight, NotExact
from shardq.figures import COUNTS, FIGURES, WEIGHED, Figures, sum_figures
from shardq.files.atomic import pread_exact, writing
from shardq.files.direct import BLOCK_BYTES, DirectDisk
from shardq.kernels import KernelChoiceError, KernelSet, load
from shardq.layouts import find_layout
from shardq.making import (
    WEIGHT_ARRAYS,
    Extent,
    Making,
    Rows,
    Tile,
    Way,
    extents_of,
    losses_of,
    measure_written,
    offset_of,
    slab_shapes,
    specs_of,
    way_of,
    write_values,
)
from shardq.quantizers.buffers import buffer_shapes, take_buffers
from shardq.quantizers.rtn import measure_rows, quantize_rows
from shardq.schemes import Scheme
from shardq.sealing import seal_files, settle_files
from shardq.source_bytes import SourceBytes
from shardq.tasks import (
    SEAL_BYTES,
    TILE_BYTES,
    Bundle,
    BundleDone,
    CopyTask,
    Done,
    Member,
    Piece,
    QuantizeTask,
    RowsTask,
    SealDone,
    Sealed,
    SealTask,
    Settled,
    SettleTask,
    Streamed,
    Surveyed,
    SurveyTask,
    Workplace,
)
from shardq.vector_cache import VectorCache

FOLD: Final = 0x9E3779B97F4A7C15  # odd multiplier that makes the order of a task's checksums count
Report = BundleDone | Surveyed | SealDone | Settled


def start(workplace: Workplace) -> Callable[[object], Report]:
    """The task handler of one worker process. Raises KernelUnavailable."""
    if workplace.log:
        workplace.log.apply()
    try:
        kernels = load()
    except KernelChoiceError as e:
        raise KernelUnavailable(str(e)) from e
    return Worker(workplace, kernels).run


class Worker:
    """Does one piece of work at a time."""

    def __init__(self, workplace: Workplace, kernels: KernelSet) -> None:
        self._place = workplace
        self._kernels = kernels
        self._arena = Arena()
        self._vectors = VectorCache()
        self._disk = DirectDisk()
        self._source = SourceBytes(workplace, self._disk)
        self._parts = Descriptors(os.O_RDWR)

    def run(self, work: object) -> Report:
        """Do it. Raises CorruptShard, NonFiniteWeight, SourceUnreadable, DiskFull."""
        self._source.memory, work = (work, work.work) if isinstance(work, Streamed) else (None, work)
        try:
            match work:
                case Bundle():
                    return self._bundle(work)
                case SurveyTask():
                    return self._survey_unverified(work) if self._source.memory else self._survey(work)
                case SealTask():
                    return self._seal(work)
                case SettleTask():
                    return self._settle(work)
                case _:
                    raise TypeError(f"not a task: {work!r}")
        finally:
            self._source.leave()
            if not self._place.keeps_memory:
                self._arena.release()
                self._source.release()

    # --- bundles -------------------------------------------------------------------------------------------------

    def _bundle(self, bundle: Bundle) -> BundleDone:
        """What an interrupted run wrote is compared with its checksum, and made again only when they differ."""
        kept = [m for m in bundle.members if m.before and self._stands(m, m.before)]
        done = [(m.lane, replace(m.before, reused=True)) for m in kept if m.before]
        if todo := tuple(m for m in bundle.members if m not in kept):
            left = replace(bundle, members=todo)
            done += self._quantize(left) if left.rows_tasks else self._copy(todo)
        return BundleDone(bundle.id, tuple(done))

    def _quantize(self, bundle: Bundle) -> Iterator[tuple[int, Done]]:
        """All outputs of one slab; those that only copy it get their bytes from it, too."""
        first = bundle.rows_tasks[0]
        rows = min(bundle.tile_rows, first.end_row - first.row)
        room, ways, makings, blocks = self._take(bundle, rows)
        copies = [m for m in bundle.members if isinstance(m.task, CopyTask)]
        sums = {m.lane: 0 for m in copies}
        checked = any(t.scheme is None for t in bundle.quantize_tasks)  # quantizing finds what is not finite
        for tile in self._tiles(first, rows, room, checked):
            self._tile(tile, ways, makings)
            for _, made in blocks:
                made.add(seldom.Given(first.row + tile.row, tile.rows, tile.dtype, tile.parts, tile.wide))
            for c in copies:
                raw = tile.rows.reshape(-1).view(np.uint8)
                sums[c.lane] = self._copy_rows(c, raw, tile.row * first.row_bytes, sums[c.lane])
        for task in bundle.quantize_tasks:
            if task.amax is not None and not math.isfinite(task.amax):
                raise NonFiniteWeight(
                    f"{task.amax_of} holds NaN or infinity, and {task.tensor} in {task.shard} takes its scale from it: "
                    "expected finite weights; the checkpoint may be damaged, or keep both with --ignore"
                )
        for m in copies:
            yield m.lane, _copied(m.task.id, sums[m.lane])
        for making in makings:
            self._write(making)
            task, losses = making.task, losses_of(making, ways)
            figures = Figures() if making.stats is None else sum_figures(making.stats, self._kernels)
            done = Done(task.id, self._checksum(making.out), figures, False, task.amax, losses)
            yield making.member.lane, done
        for lane, made in blocks:
            figures = made.finish()
            checksum = self._write_extents(lane, made.extents(), made.task.finished)
            yield lane, Done(made.task.id, checksum, figures, False)

    def _tiles(self, task: RowsTask | SurveyTask, rows: int, room: NDArray[np.uint8], checked: bool) -> Iterator[Tile]:
        """The rows of a task, `rows` at a time: as they are stored, or decoded, and then `checked` to be finite."""
        if task.encoded is None:
            kind = np.dtype(WEIGHT_ARRAYS[task.dtype])
            row_bytes, (begin, end) = task.columns * kind.itemsize, task.extent
            with self._source.open(task.shard, begin, end - begin, room, kind.itemsize, task.tensor) as slab:
                for at in range(0, end - begin, rows * row_bytes):
                    raw = slab.tile(at, min(rows * row_bytes, end - begin - at))
                    yield Tile(at // row_bytes, raw.view(kind).reshape(-1, task.columns), task.dtype)
            return
        wide = room.view(np.float32).reshape(rows, task.columns)
        read = partial(self._source.read_part, task)
        decoded = seldom.DecodedRows(task.encoded, (task.row, task.end_row), read, self._kernels, checked)
        for row in range(task.row, task.end_row, rows):
            tile, parts = decoded.tile(row, min(row + rows, task.end_row), wide)
            if task.rounds:
                yield Tile(row - task.row, seldom.round_rows(tile, task.dtype), task.dtype, tile, parts)
            else:
                yield Tile(row - task.row, tile, "F32", tile, parts)

    def _tile(self, tile: Tile, ways: Mapping[Way, Rows], makings: Sequence[Making]) -> None:
        """Quantize some rows once for each way, and pack the result for each output."""
        count, dtype = len(tile.rows), tile.dtype
        there = slice(tile.row, tile.row + count)
        for way, room in ways.items():
            scheme, amax, search, ref = way
            takers = [m for m in makings if way_of(m.task) == way]
            task = takers[0].task
            part, bad = quantize_rows(
                tile.rows, dtype, scheme, room.buffers, room.stats[there], self._kernels, amax, task.dtype, search,
                None if ref is None else self._vectors.get(ref), None if room.losses is None else room.losses[there],
                self._vectors.get_means(ref) if ref and search and search.centered else None,
            )  # fmt: skip
            if bad:
                raise self._non_finite(task, scheme, tile)
            for m in takers:
                m.layout.pack(part, tile.row, m.out, scheme, self._kernels)
                if m.task.reads_back and m.stats is not None:
                    measure_written(m, tile.rows, dtype, there, self._kernels)
                    m.stats[there, COUNTS] = room.stats[there, COUNTS]  # there are no codes any more
        for m in makings:
            if m.task.scheme is None:
                self._keep(tile, m)
            elif m.task.goal:
                self._carry(tile, m)
            elif m.task.tuned and not seldom.pack_tuned(tile, m, self._kernels):
                raise self._non_finite(m.task, m.task.scheme, tile)

    def _keep(self, tile: Tile, making: Making) -> None:
        """Rows as they were decoded, in the type that the weight has."""
        out = making.out[making.specs[0].suffix]
        task = making.task
        assert task.encoded
        assert tile.wide is not None
        is_kept = tile.dtype == task.dtype and not task.encoded.scaling
        kept = tile.rows if is_kept else seldom.keep_rows(task.encoded, tile.wide, task.dtype, self._kernels)
        kept = kept if kept.dtype == out.dtype else kept.view(out.dtype)
        if making.task.turned:
            out[:, tile.row : tile.row + len(kept)] = kept.T
        else:
            out[tile.row : tile.row + len(kept)] = kept

    def _carry(self, tile: Tile, making: Making) -> None:
        """Rows with the codes that they have."""
        task, to = making.task, making.task.goal
        assert task.encoded
        assert task.scheme
        assert to
        assert tile.parts
        assert tile.wide is not None
        assert making.stats is not None
        row, count = task.row + tile.row, len(tile.rows)
        part = seldom.carry_rows(task.encoded, tile.parts, row, row + count, to, self._kernels, task.amax)
        making.layout.pack(part, tile.row, making.out, task.scheme, self._kernels)
        there = slice(tile.row, tile.row + count)
        measure_rows(tile.wide, "F32", task.scheme, part, making.stats[there], self._kernels)

    def _write(self, making: Making) -> None:
        path = self._part(making.member.lane, making.task.file)
        with writing(path):
            for data, offset in extents_of(making.task, making.specs, making.out):
                self._disk.write(self._parts.get(path), data, offset)

    def _write_extents(self, lane: int, extents: Iterable[tuple[str, Extent]], finished: Collection[str]) -> int:
        """Write what is not for `finished` files; returns the checksum of all."""
        checksum = 0
        for file, (data, offset) in extents:
            checksum = _fold(checksum, self._kernels.checksum(data))
            if file not in finished:
                self._put(lane, file, data, offset)
        return checksum

    def _take(
        self, bundle: Bundle, rows: int
    ) -> "tuple[NDArray[Any], dict[Way, Rows], list[Making], list[tuple[int, seldom.BlockRows]]]":
        """All arrays of a slab, from the arena: room for a tile, for codes, for figures, for the outputs."""
        tasks, first = bundle.quantize_tasks, bundle.rows_tasks[0]
        slab_rows = first.end_row - first.row
        room_shape, stats_shape, losses_shape = (rows * first.row_bytes,), (slab_rows, FIGURES), (slab_rows, WEIGHED)
        works = {way: buffer_shapes(rows, first.columns, way[0]) for t in tasks if (way := way_of(t))}
        specs = [specs_of(t) for t in tasks]
        slabs = [slab_shapes(t, s) for t, s in zip(tasks, specs, strict=True)]
        own = [t.reads_back or t.goal is not None or t.tuned is not None for t in tasks]
        figures = [(stats_shape, np.float64)] * (len(works) + sum(own))
        figures += [(losses_shape, np.float64)] * sum(way[2] is not None for way in works)
        wanted = [(room_shape, np.uint8), *figures, *(shape for work in works.values() for shape in work)]
        wanted += [shape for slab in slabs for shape in slab.values()]
        wanted += [shape for t in bundle.block_tasks for shape in seldom.shapes(t)]
        self._arena.reset(reserve(*wanted) + BLOCK_BYTES * sum(map(len, slabs)))
        take = self._arena.take
        room = take(room_shape, np.uint8)
        ways = {
            way: Rows(
                take_buffers(self._arena, rows, first.columns, way[0]),
                take(stats_shape, np.float64),
                take(losses_shape, np.float64) if way[2] else None,
            )
            for way in works
        }
        quantizing = (m for m in bundle.members if isinstance(m.task, QuantizeTask))
        makings = []
        for m, t, s, slab, apart in zip(quantizing, tasks, specs, slabs, own, strict=True):
            offsets = [offset_of(t, spec, target) for spec, target in zip(s, t.targets, strict=True)]
            out = {k: take(*shape, at) for (k, shape), at in zip(slab.items(), offsets, strict=True)}  # see DirectDisk
            way = way_of(t)
            stats = take(stats_shape, np.float64) if apart else ways[way].stats if way else None
            makings.append(Making(m, t, find_layout(t.layout), s, out, stats))
        for made in makings:
            write_values(made.specs, made.out)
        blocks = [
            (m.lane, seldom.BlockRows(m.task, self._arena, self._vectors, self._kernels))
            for m in bundle.members
            if isinstance(m.task, BlocksTask)
        ]
        return room, ways, makings, blocks

    def _non_finite(self, task: QuantizeTask, scheme: Scheme, tile: Tile) -> NonFiniteWeight:
        """Say where the first value lies that cannot be quantized."""
        wide, row = np.empty(tile.rows.shape, np.float32), task.row + tile.row
        self._kernels.widen(tile.rows, tile.dtype, wide)
        where = np.argwhere(~np.isfinite(wide))
        if len(where):
            r, c = (int(x) for x in where[0])
            what = f"{'decodes to' if task.encoded else 'holds'} {wide[r, c]} at row {row + r}, column {c}"
        else:
            r = int(np.abs(wide).max(axis=1).argmax())
            what = f"holds {float(np.abs(wide[r]).max()):g} in row {row + r}, whose scale overflows {scheme.scale}"
        return NonFiniteWeight(
            f"{task.tensor} in {task.shard} {what}: expected finite weights; the checkpoint may be damaged, or keep "
            f"this tensor in source precision with --ignore {task.tensor.removesuffix('.weight')}"
        )

    # --- copy, survey, seal ----------------------------------------------------------------------------------------

    def _copy(self, members: Sequence[Member]) -> Iterator[tuple[int, Done]]:
        """Equal pieces for all outputs; each is read once, but for what is not copied as it is."""
        for m in members:
            if isinstance(m.task, VectorsTask):
                extents = self._vector_extents(m.task)
                yield m.lane, _copied(m.task.id, self._write_extents(m.lane, extents, m.task.finished))
        copies = [(m.lane, m.task) for m in members if isinstance(m.task, CopyTask)]
        tasks = [task for _, task in copies]
        if not tasks:
            return
        sums = [0] * len(tasks)
        for pieces in zip(*(t.pieces for t in tasks), strict=True):
            piece, step = pieces[0], pieces[0].step_bytes
            room = self._strips(piece, piece.target)
            with self._source.open(tasks[0].shard, piece.begin, piece.size_bytes, room, 1, piece.tensor) as slab:
                for at in range(0, piece.size_bytes, step):
                    part = slab.tile(at, min(step, piece.size_bytes - at))
                    strips = self._strip_sums(part, piece)
                    for i, ((lane, task), own) in enumerate(zip(copies, pieces, strict=True)):
                        made = _content(own, part, at)
                        found = strips if made is part else self._strip_sums(made, own)
                        sums[i] = reduce(_fold, found, sums[i])
                        self._put(lane, task.file, made, own.target + at)
        for (lane, task), checksum in zip(copies, sums, strict=True):
            yield lane, _copied(task.id, checksum)

    def _vector_extents(self, task: VectorsTask) -> Iterator[tuple[str, Extent]]:
        """All that becomes of some vectors."""
        for v in task.vectors:
            kind = np.dtype(WEIGHT_ARRAYS[v.dtype])
            self._arena.reset(v.size_bytes)
            room = self._arena.take((v.size_bytes,), np.uint8)
            with self._source.open(task.shard, v.begin, v.size_bytes, room, kind.itemsize, v.tensor) as slab:
                data = slab.tile(0, v.size_bytes).view(kind)
                for take in v.takes:
                    out = seldom.fill_vector(v, data, take, self._kernels, task.shard)
                    yield from ((take.file, extent) for extent in seldom.extents(take, 0, out))

    def _copy_rows(self, member: Member, raw: NDArray[np.uint8], at: int, checksum: int) -> int:
        """Some rows of a slab that other outputs quantize, as they are; `at`: their first byte in the slab."""
        assert isinstance(member.task, CopyTask)
        (piece,) = member.task.pieces
        raw = _content(piece, raw, at)
        self._put(member.lane, member.task.file, raw, piece.target + at)
        return reduce(_fold, self._strip_sums(raw, piece), checksum)

    def _strip_sums(self, data: NDArray[np.uint8], piece: Piece) -> list[int]:
        """Checksums of some strips of a piece."""
        step = piece.strip_bytes
        return [self._kernels.checksum(data[begin : begin + step]) for begin in range(0, data.size, step)]

    def _strips(self, piece: Piece, offset: int | None = None) -> NDArray[np.uint8]:
        """Room for what of a piece is read and written at once; `offset` as of Arena."""
        self._arena.reset(piece.step_bytes + BLOCK_BYTES)
        return self._arena.take((piece.step_bytes,), np.uint8, offset)

    def _put(self, lane: int, file: str, part: NDArray[np.uint8], offset: int) -> None:
        path = self._part(lane, file)
        with writing(path):
            self._disk.write(self._parts.get(path), part, offset)

    def _stands(self, member: Member, before: Done) -> bool:
        """True if what an interrupted run wrote is still there, and was made with the magnitude that is known now."""
        amax = member.task.amax if isinstance(member.task, QuantizeTask) else None
        return before.amax == amax and self._written(member) == before.checksum

    def _written(self, member: Member) -> int:
        """Checksum of a task's bytes in the output file."""
        task = member.task
        if isinstance(task, BlocksTask | VectorsTask):
            return self._written_extents(member.lane, task)
        fd = self._parts.get(self._part(member.lane, task.file))
        if isinstance(task, QuantizeTask):
            specs = specs_of(task)
            shapes = slab_shapes(task, specs)
            self._arena.reset(reserve(*shapes.values()))
            out = {k: self._arena.take(*shape) for k, shape in shapes.items()}
            for data, offset in extents_of(task, specs, out):
                pread_exact(fd, data.data, offset, task.file)
            return self._checksum(out)
        checksum = 0
        for piece in task.pieces:
            room, step = self._strips(piece), piece.step_bytes
            for at in range(0, piece.size_bytes, step):
                part = room[: min(step, piece.size_bytes - at)]
                pread_exact(fd, part.data, piece.target + at, task.file)
                checksum = reduce(_fold, self._strip_sums(part, piece), checksum)
        return checksum

    def _written_extents(self, lane: int, task: BlocksTask | VectorsTask) -> int:
        """The same of what goes to places of its own."""
        checksum = 0
        for file, begin, size in seldom.written_extents(task):
            self._arena.reset(size)
            room = self._arena.take((size,), np.uint8)
            pread_exact(self._parts.get(self._part(lane, file)), room.data, begin, file)
            checksum = _fold(checksum, self._kernels.checksum(room))
        return checksum

    def _survey_unverified(self, task: SurveyTask) -> Surveyed:
        """Of bytes that cannot be decoded an infinite one: what is wrong the bundle over the same bytes says, and that
        waits until they are known to be the source's."""
        try:
            return self._survey(task)
        except (CorruptShard, NonFiniteWeight, NotExact):
            return Surveyed(task.tensor, task.key, math.inf)

    def _survey(self, task: SurveyTask) -> Surveyed:
        """The largest magnitude of some rows."""
        row_bytes = task.columns * (4 if task.encoded else np.dtype(WEIGHT_ARRAYS[task.dtype]).itemsize)
        rows = max(1, TILE_BYTES // row_bytes)
        self._arena.reset(reserve(((rows * row_bytes,), np.uint8), ((rows, 1), np.float32)))
        room = self._arena.take((rows * row_bytes,), np.uint8)
        found = self._arena.take((rows, 1), np.float32)
        amax = 0.0
        for tile in self._tiles(task, rows, room, checked=False):
            count = len(tile.rows)
            if task.goal and task.encoded and tile.parts:
                at = task.row + tile.row
                largest = seldom.largest_scale(task.encoded, tile.parts, at, at + count, task.goal, self._kernels)
            else:
                self._kernels.group_absmax(tile.rows, tile.dtype, task.columns, found[:count])
                largest = float(found[:count].max())
            amax = max(amax, largest)
        return Surveyed(task.tensor, task.key, amax)

    def _seal(self, task: SealTask) -> SealDone:
        """Finished files."""
        self._parts.close()
        self._arena.reset(SEAL_BYTES)
        room = self._arena.take((SEAL_BYTES,), np.uint8)
        found = seal_files([self._part(f.lane, f.file) for f in task.files], task.files, room, self._disk)
        return SealDone(tuple(Sealed(f.lane, f.file, sha256) for f, sha256 in zip(task.files, found, strict=True)))

    def _settle(self, task: SettleTask) -> Settled:
        """Unfinished files."""
        self._parts.close()
        settle_files(self._part(task.lane, file) for file in task.files)
        return Settled(task.lane, task.shard)

    # --- files -----------------------------------------------------------------------------------------------------

    def _part(self, lane: int, file: str) -> str:
        return os.path.join(self._place.parts[lane], file)

    def _checksum(self, out: Mapping[str, NDArray[Any]]) -> int:
        checksum = 0
        for array in out.values():
            if array.size:
                checksum = _fold(checksum, self._kernels.checksum(array.reshape(-1).view(np.uint8)))
        return checksum


def _content(piece: Piece, part: NDArray[np.uint8], at: int) -> NDArray[np.uint8]:
    """What goes into the output for a part of a piece, which begins at `at`: that, or what replaces it."""
    if piece.replaced is None:
        return part
    return np.frombuffer(seldom.read_replaced(piece.replaced, at, part.size), np.uint8)


def _copied(number: int, checksum: int) -> Done:
    return Done(number, checksum, Figures(), False)


def _fold(checksum: int, more: int) -> int:
    return (checksum * FOLD + more) & 0xFFFFFFFFFFFFFFFF
