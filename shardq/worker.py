"""Worker: turns one task into bytes at planned offsets of an output file. numpy and native kernels only.

Inputs and outputs are files; only the small records of `tasks` cross the process border. Memory is one arena that is
reused from task to task, because fresh pages cost more than the arithmetic.
"""

import hashlib
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from shardq.arena import Arena, reserve
from shardq.descriptors import Descriptors
from shardq.errors import KernelUnavailable, NonFiniteWeight
from shardq.files.atomic import pread_exact, pwrite_all, writing
from shardq.files.writeback import start_writeback
from shardq.kernels import KernelChoiceError, KernelSet, load
from shardq.layouts import find_layout
from shardq.layouts.base import OutSpec
from shardq.quantizers.buffers import Buffers, buffer_shapes, take_buffers
from shardq.quantizers.rtn import quantize_rows
from shardq.slabs import Mappings, Slab, open_slab
from shardq.tasks import TILE_BYTES, Checked, CopyTask, Done, QuantizeTask, Sealed, SealTask, Streamed, Task, Workplace

WEIGHT_ARRAYS: Final[Mapping[str, type]] = {"BF16": np.uint16, "F16": np.uint16, "F32": np.float32}
TARGET_ARRAYS: Final[Mapping[str, type]] = {  # patterns where numpy has no such type
    "I32": np.int32, "I64": np.int64, "I8": np.int8, "U8": np.uint8, "F8_E4M3": np.uint8, "F16": np.float16,
    "BF16": np.uint16, "F32": np.float32,
}  # fmt: skip
FOLD: Final = 0x9E3779B97F4A7C15  # odd multiplier that makes the order of a task's checksums count
Extent = tuple[NDArray[np.uint8], int]  # bytes in memory, offset in the output file


def start(workplace: Workplace) -> Callable[[object], Done | Sealed]:
    """The task handler of one worker process. Raises KernelUnavailable."""
    if workplace.log:
        workplace.log.apply()
    try:
        kernels = load()
    except KernelChoiceError as e:
        raise KernelUnavailable(str(e)) from e
    return Worker(workplace, kernels).run


class Worker:
    """Runs tasks one at a time."""

    def __init__(self, workplace: Workplace, kernels: KernelSet) -> None:
        self._place = workplace
        self._kernels = kernels
        self._arena = Arena()
        self._sources = Descriptors(os.O_RDONLY)
        self._mappings = Mappings()
        self._parts = Descriptors(os.O_RDWR)
        self._memory: Streamed | None = None  # where the present task's source bytes are, if not in a file

    def run(self, work: object) -> Done | Sealed:
        """Do one task. Raises CorruptShard, NonFiniteWeight, SourceUnreadable, DiskFull."""
        began = time.perf_counter()
        self._memory, work = (work, work.task) if isinstance(work, Streamed) else (None, work)
        match work:
            case QuantizeTask():
                done: Done | Sealed = self._quantize(work)
            case CopyTask():
                done = self._copy(work)
            case Checked():
                done = self._check(work)
            case SealTask():
                done = self._seal(work)
            case _:
                raise TypeError(f"not a task: {work!r}")
        return replace(done, seconds=time.perf_counter() - began)

    # --- quantize ------------------------------------------------------------------------------------------------

    def _quantize(self, task: QuantizeTask) -> Done:
        layout = find_layout(task.layout)
        specs = layout.outputs(task.scheme, task.dtype, task.rows, task.columns)
        rows = min(task.tile_rows, task.end_row - task.row)
        room, buffers, stats, out = self._take(task, specs, rows)
        write_values(specs, out)
        kind = np.dtype(WEIGHT_ARRAYS[task.dtype])
        begin = task.begin + task.row * task.row_bytes
        with self._open(task.shard, begin, task.source_bytes, room, kind.itemsize, task.tensor) as slab:
            for row in range(0, task.end_row - task.row, rows):
                count = min(rows, task.end_row - task.row - row)
                raw = slab.tile(row * task.row_bytes, count * task.row_bytes)
                tile: NDArray[Any] = raw.view(kind).reshape(count, task.columns)
                into = stats[row : row + count]
                part, bad = quantize_rows(tile, task.dtype, task.scheme, buffers, into, self._kernels, task.amax)
                if bad:
                    raise self._non_finite(task, tile, task.row + row)
                layout.pack(part, row, out, task.scheme, self._kernels)
        extents = list(_extents(task, specs, out))
        with writing(self._part(task.file)):
            for data, offset in extents:
                pwrite_all(self._parts.get(self._part(task.file)), data.data, offset)
        squared_error, squared_weight, max_error = self._kernels.sum_errors(stats)
        return Done(
            task.id,
            self._checksum(out),
            squared_error,
            squared_weight,
            max_error,
            0.0,
            False,
        )

    def _take(
        self, task: QuantizeTask, specs: tuple[OutSpec, ...], rows: int
    ) -> tuple[NDArray[Any], Buffers, NDArray[np.float64], dict[str, NDArray[Any]]]:
        """All arrays of a task, from the arena: room for a tile, for its codes, for figures, for the outputs."""
        slab_rows, room_shape = task.end_row - task.row, (rows * task.row_bytes,)
        slabs = {s.suffix: (s.slab_shape(task.row, task.end_row), TARGET_ARRAYS[s.dtype]) for s in specs}
        work = buffer_shapes(rows, task.columns, task.scheme)
        self._arena.reset(reserve((room_shape, np.uint8), *work, ((slab_rows, 3), np.float64), *slabs.values()))
        room = self._arena.take(room_shape, np.uint8)
        buffers = take_buffers(self._arena, rows, task.columns, task.scheme)
        stats = self._arena.take((slab_rows, 3), np.float64)
        return (
            room,
            buffers,
            stats,
            {k: self._arena.take(shape, dtype) for k, (shape, dtype) in slabs.items()},
        )

    def _non_finite(self, task: QuantizeTask, tile: NDArray[Any], row: int) -> NonFiniteWeight:
        """Say where the first value lies that cannot be quantized."""
        wide = np.empty(tile.shape, np.float32)
        self._kernels.widen(tile, task.dtype, wide)
        where = np.argwhere(~np.isfinite(wide))
        if len(where):
            r, c = (int(x) for x in where[0])
            what = f"holds {wide[r, c]} at row {row + r}, column {c}"
        else:
            r = int(np.abs(wide).max(axis=1).argmax())
            what = f"holds {float(np.abs(wide[r]).max()):g} in row {row + r}, whose scale overflows {task.scheme.scale}"
        return NonFiniteWeight(
            f"{task.tensor} in {task.shard} {what}: expected finite weights; the checkpoint may be damaged, or keep "
            f"this tensor in source precision with --ignore {task.tensor.removesuffix('.weight')}"
        )

    # --- copy, check, seal -----------------------------------------------------------------------------------------

    def _copy(self, task: CopyTask) -> Done:
        self._arena.reset(TILE_BYTES)
        tile = self._arena.take((TILE_BYTES,), np.uint8)
        checksum = 0
        for piece in task.pieces:
            with self._open(task.shard, piece.begin, piece.size_bytes, tile, 1, piece.tensor) as slab:
                for at in range(0, piece.size_bytes, TILE_BYTES):
                    part = slab.tile(at, min(TILE_BYTES, piece.size_bytes - at))
                    with writing(self._part(task.file)):
                        pwrite_all(self._parts.get(self._part(task.file)), part.data, piece.target + at)
                    checksum = _fold(checksum, self._kernels.checksum(part))
        return Done(task.id, checksum, 0.0, 0.0, 0.0, 0.0, False)

    def _check(self, work: Checked) -> Done:
        """Compare what an interrupted run wrote with its checksum, and do the task again when they differ."""
        if self._written(work.task) == work.done.checksum:
            return replace(work.done, reused=True)
        return self._quantize(work.task) if isinstance(work.task, QuantizeTask) else self._copy(work.task)

    def _written(self, task: Task) -> int:
        """Checksum of a task's bytes in the output file."""
        fd = self._parts.get(self._part(task.file))
        if isinstance(task, QuantizeTask):
            specs = find_layout(task.layout).outputs(task.scheme, task.dtype, task.rows, task.columns)
            *_, out = self._take(task, specs, min(task.tile_rows, task.end_row - task.row))
            for data, offset in _extents(task, specs, out):
                pread_exact(fd, data.data, offset, task.file)
            return self._checksum(out)
        self._arena.reset(TILE_BYTES)
        tile = self._arena.take((TILE_BYTES,), np.uint8)
        checksum = 0
        for piece in task.pieces:
            for at in range(0, piece.size_bytes, TILE_BYTES):
                part = tile[: min(TILE_BYTES, piece.size_bytes - at)]
                pread_exact(fd, part.data, piece.target + at, task.file)
                checksum = _fold(checksum, self._kernels.checksum(part))
        return checksum

    def _seal(self, task: SealTask) -> Sealed:
        """fsync and sha256 of a finished file; the disk writes while the hash runs."""
        path = self._part(task.file)
        self._parts.close()
        self._arena.reset(TILE_BYTES)
        tile = self._arena.take((TILE_BYTES,), np.uint8)
        digest = hashlib.sha256()
        with writing(path):
            fd = os.open(path, os.O_RDWR)
            try:
                start_writeback(fd)
                for at in range(0, task.size_bytes, TILE_BYTES):  # read: page faults of a map cost more than the copy
                    part = tile[: min(TILE_BYTES, task.size_bytes - at)]
                    pread_exact(fd, part.data, at, task.file)
                    digest.update(part.data)
                try:
                    os.fsync(fd)
                except OSError:
                    os.unlink(path)  # what is read back may never reach the disk, yet would pass for done
                    raise
            finally:
                os.close(fd)
        return Sealed(task.file, digest.hexdigest(), 0.0)

    # --- files -----------------------------------------------------------------------------------------------------

    def _part(self, file: str) -> str:
        return os.path.join(self._place.part, file)

    def _open(
        self, shard: str, begin: int, size_bytes: int, room: NDArray[np.uint8], alignment: int, tensor: str
    ) -> AbstractContextManager[Slab]:
        what = f"{tensor} in {shard}"
        if memory := self._memory:
            pages = self._mappings.get(memory.path)
            return open_slab(pages, begin - memory.origin, size_bytes, room, alignment, what)
        fd = self._sources.get(self._place.sources[shard])
        return open_slab(fd, begin, size_bytes, room, alignment, what)

    def _checksum(self, out: Mapping[str, NDArray[Any]]) -> int:
        checksum = 0
        for array in out.values():
            if array.size:
                checksum = _fold(checksum, self._kernels.checksum(array.reshape(-1).view(np.uint8)))
        return checksum


def write_values(specs: Iterable[OutSpec], out: Mapping[str, NDArray[Any]]) -> None:
    """Fill the arrays whose content no weight decides."""
    for spec in specs:
        if spec.values and out[spec.suffix].size:
            out[spec.suffix][:] = spec.values


def _fold(checksum: int, more: int) -> int:
    return (checksum * FOLD + more) & 0xFFFFFFFFFFFFFFFF


def _extents(task: QuantizeTask, specs: tuple[OutSpec, ...], out: Mapping[str, NDArray[Any]]) -> Iterator[Extent]:
    """The runs of bytes that a slab occupies in its file: one for a whole tensor, one a row where rows are columns."""
    for spec, target in zip(specs, task.targets, strict=True):
        array = out[spec.suffix]
        if array.size == 0:
            continue
        whole = array.shape == spec.shape
        if whole or spec.slab_axis == 0:
            first = 0 if whole else spec.slab_range(task.row, task.end_row)[0]
            yield array.reshape(-1).view(np.uint8), target.begin + first * array[0].nbytes
            continue
        first = spec.slab_range(task.row, task.end_row)[0]
        for i, line in enumerate(array):
            yield line.view(np.uint8), target.begin + (i * spec.shape[1] + first) * array.itemsize
