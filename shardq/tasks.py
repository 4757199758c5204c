"""Units of work that a plan is made of: small frozen values that travel to a worker; arrays never do."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from shardq.formats import STORAGE
from shardq.logs import LogConfig
from shardq.schemes import Scheme

TILE_BYTES = 1 << 20  # source bytes held at once: fits a core's second-level cache with its codes
SLAB_BYTES = 64 << 20  # source bytes of the largest task; fixed, so that plans do not depend on the machine
SPAN_BYTES = SLAB_BYTES  # source bytes that range mode holds in one piece; no task reaches over two


@dataclass(frozen=True, slots=True)
class Target:
    """One output tensor of a module and where it lies in its file."""

    suffix: str
    dtype: str  # safetensors tag
    shape: tuple[int, ...]  # of the whole tensor
    begin: int  # offset of its first byte in the output file


@dataclass(frozen=True, slots=True)
class QuantizeTask:
    """Quantize rows `row` to `end_row` of one weight matrix and write them into its module's tensors."""

    kind: ClassVar[str] = "quantize"
    id: int
    shard: str  # source shard
    file: str  # output file
    tensor: str  # source name, for messages
    dtype: str
    begin: int  # offset of the whole matrix in the source shard
    rows: int  # of the whole matrix
    columns: int
    row: int
    end_row: int
    scheme: Scheme
    layout: str
    targets: tuple[Target, ...]
    amax: float | None = None  # see quantizers.rtn; filled in when it is known

    @property
    def row_bytes(self) -> int:
        """Source bytes of one row."""
        return self.columns * STORAGE[self.dtype].bits // 8

    @property
    def source_bytes(self) -> int:
        """Source bytes that this task reads."""
        return (self.end_row - self.row) * self.row_bytes

    @property
    def extent(self) -> tuple[int, int]:
        """The first byte in the source shard that it reads, and the byte behind the last."""
        return self.begin + self.row * self.row_bytes, self.begin + self.end_row * self.row_bytes

    @property
    def tile_rows(self) -> int:
        """Rows quantized at once: a multiple of 32 and of the rows that share a scale, as make about TILE_BYTES."""
        unit = math.lcm(32, self.scheme.group_rows)
        return max(unit, TILE_BYTES // self.row_bytes // unit * unit)

    @property
    def cost_bytes(self) -> int:
        """Memory while it runs: the slab's outputs, a tile of source, codes, words and scales, and one widened row."""
        share = (self.end_row - self.row) / self.rows
        out = sum(_size(t) for t in self.targets) * share
        tile = min(self.tile_rows, self.end_row - self.row)
        groups = self.scheme.groups(self.columns)
        return int(out) + tile * (self.row_bytes + 2 * self.columns + 40 * groups) + 4 * self.columns + (1 << 20)


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes of one tensor, or a part of them, that are copied as they are."""

    tensor: str
    begin: int  # in the source shard
    target: int  # in the output file
    size_bytes: int


@dataclass(frozen=True, slots=True)
class CopyTask:
    """Copy some tensors of one shard unchanged."""

    kind: ClassVar[str] = "copy"
    id: int
    shard: str
    file: str
    pieces: tuple[Piece, ...]

    @property
    def tensor(self) -> str:
        """Name of the first tensor, for messages."""
        return self.pieces[0].tensor

    @property
    def source_bytes(self) -> int:
        """Source bytes that this task reads."""
        return sum(p.size_bytes for p in self.pieces)

    @property
    def extent(self) -> tuple[int, int]:
        """The first byte in the source shard that it reads, and the byte behind the last."""
        return min(p.begin for p in self.pieces), max(p.begin + p.size_bytes for p in self.pieces)

    @property
    def cost_bytes(self) -> int:
        """Memory while it runs."""
        return 2 * TILE_BYTES


Task = QuantizeTask | CopyTask


@dataclass(frozen=True, slots=True)
class Streamed:
    """A task whose source bytes are in memory, not in a file of their own."""

    task: Task
    path: str  # where a process opens the memory
    origin: int  # offset in the source shard of the memory's first byte


@dataclass(frozen=True, slots=True)
class SealTask:
    """Make a finished output file durable and take its sha256."""

    kind: ClassVar[str] = "seal"
    file: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Done:
    """What a worker reports of a QuantizeTask or CopyTask."""

    id: int
    checksum: int  # kernels.checksum of the written bytes, arrays in target order
    squared_error: float  # sum of (weight - dequantized)**2; 0 for a copy
    squared_weight: float  # sum of weight**2; 0 for a copy
    max_error: float  # largest |weight - dequantized|; 0 for a copy
    seconds: float
    reused: bool  # the bytes were there already


@dataclass(frozen=True, slots=True)
class Checked:
    """A task that an interrupted run has done: done again only when the bytes on disk do not have its checksum."""

    task: Task
    done: Done


@dataclass(frozen=True, slots=True)
class Sealed:
    """What a worker reports of a SealTask."""

    file: str
    sha256: str
    seconds: float


@dataclass(frozen=True, slots=True)
class Workplace:
    """Where a run's files are; the same for all its tasks."""

    sources: Mapping[str, str]  # shard -> path of a readable file
    part: str  # folder of unfinished output files
    log: LogConfig | None


def _size(t: Target) -> int:
    n = STORAGE[t.dtype].bits // 8
    for d in t.shape:
        n *= d
    return n
