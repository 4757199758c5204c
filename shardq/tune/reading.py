"""The tensors of a block from the shards: every byte once, in few ranges, side by side, ahead of their use."""

import math
import mmap
import os
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from shardq.checkpoint import TensorRef
from shardq.decoded import DecodedRows
from shardq.dequantize.base import Encoded, Part
from shardq.dequantize.decoding import Ranges
from shardq.errors import DiskFull, UnsupportedSource
from shardq.kernels import KernelSet
from shardq.sources.base import FileReader, Source
from shardq.tune.waiting import WaitingRoom
from shardq.weights import is_turned, kept_shape

PIECE_BYTES: Final = 32 << 20  # read at once, and freed at once
LOCAL_PIECE_BYTES: Final = 4 << 20  # the same of files on this machine, where a request costs nothing
AHEAD: Final = 3  # pieces under way of a tensor that nobody has asked for before
NEAR_BYTES: Final = 1 << 18  # between rows that are read together, and read at once of them
TILE_WEIGHTS: Final = 1 << 20  # decoded at once
REMOTE_READERS: Final = 4
LOCAL_READERS: Final = 2
TORCH: Final[Mapping[str, torch.dtype]] = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}

Span = tuple[int, int]


class Piece:
    """Consecutive bytes of a shard that are read at once, and given back when all tensors in it are made."""

    def __init__(self, shard: str, begin: int, end: int) -> None:
        self.shard, self.begin, self.end = shard, begin, end
        self.users = 0
        self.content: Future[NDArray[np.uint8]] | None = None
        self.waiting: Waiting | None = None

    def release(self) -> None:
        """One tensor less needs it."""
        self.users -= 1
        if not self.users:
            self.content = self.waiting = None


@dataclass(frozen=True, slots=True)
class Waiting:
    """A piece that is in a file of this machine, or on its way there."""

    room: WaitingRoom
    offset: int
    there: Future[None]

    def take(self, size_bytes: int) -> NDArray[np.uint8]:
        """Waits until it is there. Raises what reading and writing it has raised."""
        self.there.result()
        return self.room.take(self.offset, size_bytes)


class BlockReader:
    """Reads groups of tensors of one source. For one thread; its own read in the background."""

    def __init__(self, source: Source, kernels: KernelSet) -> None:
        self._source, self._kernels = source, kernels
        self._pool = ThreadPoolExecutor(REMOTE_READERS if source.remote else LOCAL_READERS, "shardq-blocks")
        self._idle: dict[str, list[FileReader]] = defaultdict(list)
        self._lock = Lock()
        self._piece_bytes = PIECE_BYTES if source.remote else LOCAL_PIECE_BYTES

    def fetch(self, tensors: Sequence[TensorRef], whole: bool) -> "Fetched":
        """Begin to read some tensors: `whole`, all bytes of all of them, or each when it is taken. What lies in files
        of this machine comes no nearer than into the system's cache before it is taken, which costs no memory that
        cannot be given back."""
        fetched = Fetched(tensors, self._piece_bytes, self._kernels, self._begin)
        for piece in fetched.pieces() if whole else ():
            self._expect(piece)
        return fetched

    def fetch_beside(self, tensors: Sequence[TensorRef], folder: Path, most_bytes: int | None) -> "Fetched | None":
        """`fetch` all bytes of some tensors while memory is needed for others: what is not on this machine waits in a
        file of a folder. None where that has no room, or would take more than `most_bytes`."""
        fetched = Fetched(tensors, LOCAL_PIECE_BYTES, self._kernels, self._begin)
        far = [p for p in fetched.pieces() if self._source.local_path(p.shard) is None]
        size_bytes = sum(p.end - p.begin for p in far)
        if most_bytes is not None and size_bytes > most_bytes:
            return None
        try:
            room = WaitingRoom(folder, size_bytes) if far else None
        except DiskFull:
            return None
        offset = 0
        for piece in fetched.pieces():
            if room is None or self._source.local_path(piece.shard) is not None:
                self._expect(piece)
                continue
            piece.waiting = Waiting(room, offset, self._pool.submit(self._put, piece, room, offset))
            offset += piece.end - piece.begin
        return fetched

    def _put(self, piece: Piece, room: WaitingRoom, offset: int) -> None:
        room.put(self._read(piece.shard, piece.begin, piece.end), offset)

    def _expect(self, piece: Piece) -> None:
        path = self._source.local_path(piece.shard)
        if path is None:
            self._begin(piece)
        elif hasattr(os, "posix_fadvise"):
            self._pool.submit(_bring_near, path, piece.begin, piece.end)

    def fetch_rows(self, t: TensorRef, rows: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A matrix of floats that are stored as they are, of which only some rows, rising, are read: the others are
        zeros, which take no memory until they are touched."""
        assert t.shape is not None
        stored = TORCH[t.dtype or ""]
        row_bytes = t.shape[1] * stored.itemsize
        made = _zeros(t.shape, dtype)
        spans = [(t.begin + row * row_bytes, t.begin + (row + 1) * row_bytes) for row in rows]
        step = max(1, NEAR_BYTES // row_bytes) * row_bytes
        windows = [span for near in _joined(spans, NEAR_BYTES) for span in _cut(*near, step)]
        read = self._pool.map(lambda span: (span[0], self._read(t.shard, *span)), windows)
        wanted = set(rows)
        for begin, raw in read:
            first = (begin - t.begin) // row_bytes
            values = torch.from_numpy(raw).view(stored).reshape(-1, t.shape[1])
            for row in range(first, first + len(values)):
                if row in wanted:
                    made[row] = values[row - first]
        return made

    def _begin(self, piece: Piece) -> None:
        if piece.content is not None:
            return
        if piece.waiting is None:
            piece.content = self._pool.submit(self._read, piece.shard, piece.begin, piece.end)
        else:  # behind all that is put there, so that no thread waits for what none is left to do
            piece.content = self._pool.submit(piece.waiting.take, piece.end - piece.begin)

    def close(self) -> None:
        """Let go of files and threads; what is being read comes to its end."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        for reader in (r for of in self._idle.values() for r in of):
            reader.close()
        self._idle.clear()

    def _read(self, shard: str, begin: int, end: int) -> NDArray[np.uint8]:
        with self._lock:
            idle = self._idle[shard]
            reader = idle.pop() if idle else None
        reader = reader or self._source.open_file(shard, _no_report)
        data = np.empty(end - begin, np.uint8)
        reader.read_into(begin, data.data)
        with self._lock:
            self._idle[shard].append(reader)
        return data


class Fetched:
    """Tensors whose bytes are here, or under way."""

    def __init__(
        self,
        tensors: Sequence[TensorRef],
        piece_bytes: int,
        kernels: KernelSet,
        begin: Callable[[Piece], None],
    ) -> None:
        self._tensors = {t.name: t for t in tensors}
        self._pieces = _pieces(tensors, piece_bytes)
        self._starts = {shard: [p.begin for p in of] for shard, of in self._pieces.items()}
        self._piece_bytes, self._kernels, self._begin = piece_bytes, kernels, begin
        for p in (p for t in tensors for span in _spans(t) for p in self._over(*span)):
            p.users += 1

    def pieces(self) -> Iterator[Piece]:
        """All that is read."""
        return (p for of in self._pieces.values() for p in of)

    def take(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """A tensor as the checkpoint has it, once: floats in `dtype`, others in their own type; encoded ones decoded in
        fp32 and rounded once, half to even. Waits for its bytes. Raises NonFiniteWeight, and what reading raises."""
        t = self._tensors.pop(name)
        if not t.encoded:
            return self._plain(t, dtype)
        made = self._decoded(t, dtype)
        for p in (p for span in _spans(t) for p in self._over(*span)):
            p.release()
        return made

    def _plain(self, t: TensorRef, dtype: torch.dtype) -> torch.Tensor:
        assert t.shape is not None
        stored = TORCH.get(t.dtype or "")
        if stored is None:
            raise UnsupportedSource(f"{t.name} in {t.shard} has the type {t.dtype}: no block can be made of it")
        made = torch.empty(t.shape, dtype=dtype if stored.is_floating_point else stored)
        flat, at = made.reshape(-1), 0
        for begin in range(t.begin, t.end, step := self._piece_bytes // stored.itemsize * stored.itemsize):
            for p in self._over(t.shard, begin, min(t.end, begin + AHEAD * step)):
                self._begin(p)
            raw = np.empty(min(step, t.end - begin), np.uint8)
            self._copy(t.shard, begin, raw)
            values = torch.from_numpy(raw).view(stored)
            flat[at : at + len(values)] = values
            at += len(values)
            for p in list(self._over(t.shard, begin, begin + len(raw))):
                if p.end <= begin + len(raw) or begin + len(raw) == t.end:
                    p.release()
        return made

    def _decoded(self, t: TensorRef, dtype: torch.dtype) -> torch.Tensor:
        made = torch.empty(kept_shape(t), dtype=dtype)
        for index, e in enumerate(t.encoded):
            goal = made if e.index is None else made[index]
            self._decode(e, goal.T if is_turned(t) else goal)
        return made

    def _decode(self, e: Encoded, goal: torch.Tensor) -> None:
        rows = max(1, TILE_WEIGHTS // e.columns)
        reader = DecodedRows(e, (0, e.rows), self._window, self._kernels)
        room = np.empty((min(rows, e.rows), e.columns), np.float32)
        for row in range(0, e.rows, rows):
            found, _ = reader.tile(row, min(e.rows, row + rows), room)
            goal[row : row + len(found)] = torch.from_numpy(found).reshape(goal[row : row + len(found)].shape)

    def _window(self, part: Part, ranges: Ranges) -> NDArray[np.uint8]:
        data = np.empty(sum(end - begin for begin, end in ranges), np.uint8)
        at = 0
        for begin, end in ranges:
            self._copy(part.shard, begin, data[at : at + end - begin])
            at += end - begin
        return data

    def _copy(self, shard: str, begin: int, out: NDArray[np.uint8]) -> None:
        end = begin + len(out)
        wanted = list(self._over(shard, begin, end))
        for p in wanted:
            self._begin(p)
        for p in wanted:
            assert p.content is not None
            content, first, behind = p.content.result(), max(begin, p.begin), min(end, p.end)
            out[first - begin : behind - begin] = content[first - p.begin : behind - p.begin]

    def _over(self, shard: str, begin: int, end: int) -> Iterator[Piece]:
        """The pieces that hold some bytes."""
        pieces = self._pieces[shard]
        at = bisect_right(self._starts[shard], begin) - 1
        while at < len(pieces) and pieces[at].begin < end:
            yield pieces[at]
            at += 1


def _spans(t: TensorRef) -> Iterator[tuple[str, int, int]]:
    """Where the bytes of a tensor lie, without those that are empty."""
    if not t.encoded and t.begin < t.end:
        yield t.shard, t.begin, t.end
    for e in t.encoded:
        for part, ranges in e.reads(0, e.rows):
            for begin, end in ranges:
                yield part.shard, begin, end


def _pieces(tensors: Sequence[TensorRef], size_bytes: int) -> dict[str, list[Piece]]:
    """All bytes of some tensors in pieces, by shard and in order: neighbours together, up to a size."""
    spans: dict[str, list[Span]] = defaultdict(list)
    for t in tensors:
        for shard, begin, end in _spans(t):
            spans[shard].append((begin, end))
    pieces = {shard: [s for near in _joined(of) for s in _cut(*near, size_bytes)] for shard, of in spans.items()}
    return {shard: [Piece(shard, *span) for span in of] for shard, of in pieces.items()}


def _joined(spans: list[Span], gap_bytes: int = 0) -> Iterator[Span]:
    """Spans as few as possible: those that overlap, or are no further apart, together."""
    begin = end = -1
    for first, behind in sorted(spans):
        if begin < 0:
            begin, end = first, behind
        elif first <= end + gap_bytes:
            end = max(end, behind)
        else:
            yield begin, end
            begin, end = first, behind
    if begin >= 0:
        yield begin, end


def _cut(begin: int, end: int, size_bytes: int) -> Iterator[Span]:
    for at in range(begin, end, size_bytes):
        yield at, min(end, at + size_bytes)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Of which only pages that are written to take memory. (numpy asks for huge ones, each of which has many rows.)"""
    size_bytes = math.prod(shape) * dtype.itemsize
    pages = mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=dtype).reshape(shape)


def _bring_near(path: Path, begin: int, end: int) -> None:
    """Have the system read some bytes of a file into its cache."""
    with suppress(OSError):  # who reads them is told
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.posix_fadvise(fd, begin, end - begin, os.POSIX_FADV_WILLNEED)
        finally:
            os.close(fd)


def _no_report(count: int) -> None:
    del count
