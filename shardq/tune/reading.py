"""The tensors of a block from the shards: every byte once, in few ranges, side by side, ahead of their use."""

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from shardq.checkpoint import TensorRef
from shardq.decoded import DecodedRows
from shardq.dequantize.base import Encoded, Part
from shardq.dequantize.decoding import Ranges
from shardq.errors import UnsupportedSource
from shardq.kernels import KernelSet
from shardq.sources.base import FileReader, Source
from shardq.weights import is_turned, kept_shape

PIECE_BYTES: Final = 32 << 20  # read at once, and freed at once
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


class BlockReader:
    """Reads groups of tensors of one source. For one thread; its own read in the background."""

    def __init__(self, source: Source, kernels: KernelSet) -> None:
        self._source, self._kernels = source, kernels
        self._pool = ThreadPoolExecutor(REMOTE_READERS if source.remote else LOCAL_READERS, "shardq-blocks")
        self._idle: dict[str, list[FileReader]] = defaultdict(list)
        self._lock = Lock()

    def fetch(self, tensors: Sequence[TensorRef]) -> "Fetched":
        """Begin to read all bytes of some tensors."""
        pieces = _pieces(tensors)
        for p in (p for of in pieces.values() for p in of):
            p.content = self._pool.submit(self._read, p.shard, p.begin, p.end)
        return Fetched(tensors, pieces, self._kernels)

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

    def __init__(self, tensors: Sequence[TensorRef], pieces: Mapping[str, Sequence[Piece]], kernels: KernelSet) -> None:
        self._tensors = {t.name: t for t in tensors}
        self._pieces = pieces
        self._starts = {shard: [p.begin for p in of] for shard, of in pieces.items()}
        self._kernels = kernels
        for p in (p for t in tensors for span in _spans(t) for p in self._over(*span)):
            p.users += 1

    def take(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """A tensor as the checkpoint has it, once: floats in `dtype`, others in their own type; encoded ones decoded in
        fp32 and rounded once, half to even. Waits for its bytes. Raises NonFiniteWeight, and what reading raises."""
        t = self._tensors.pop(name)
        made = self._decoded(t, dtype) if t.encoded else self._plain(t, dtype)
        for shard, begin, end in _spans(t):
            for p in self._over(shard, begin, end):
                p.users -= 1
                if not p.users:
                    p.content = None
        return made

    def _plain(self, t: TensorRef, dtype: torch.dtype) -> torch.Tensor:
        assert t.shape is not None
        stored = TORCH.get(t.dtype or "")
        if stored is None:
            raise UnsupportedSource(f"{t.name} in {t.shard} has the type {t.dtype}: no block can be made of it")
        made = torch.empty(t.shape, dtype=stored)
        if t.size_bytes:
            self._copy(t.shard, t.begin, made.reshape(-1).view(torch.uint8).numpy())
        return made.to(dtype) if stored.is_floating_point else made

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
        for p in self._over(shard, begin, end):
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


def _pieces(tensors: Sequence[TensorRef]) -> dict[str, list[Piece]]:
    """All bytes of some tensors in pieces, by shard and in order: neighbours together, up to PIECE_BYTES."""
    spans: dict[str, list[Span]] = defaultdict(list)
    for t in tensors:
        for shard, begin, end in _spans(t):
            spans[shard].append((begin, end))
    return {shard: [Piece(shard, *span) for span in _joined(of)] for shard, of in spans.items()}


def _joined(spans: list[Span]) -> Iterator[Span]:
    begin = end = -1
    for first, behind in sorted(spans):
        if first > end or begin < 0:
            yield from _cut(begin, end)
            begin, end = first, behind
        else:
            end = max(end, behind)
    yield from _cut(begin, end)


def _cut(begin: int, end: int) -> Iterator[Span]:
    for at in range(begin, end, PIECE_BYTES) if begin >= 0 else ():
        yield at, min(end, at + PIECE_BYTES)


def _no_report(count: int) -> None:
    del count
