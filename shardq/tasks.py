"""Units of work that a plan is made of: small frozen values that travel to a worker; arrays never do."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from shardq.block_tasks import BlocksTask, VectorsTask
from shardq.figures import FIGURES, WEIGHED, Figures, Losses
from shardq.formats import STORAGE
from shardq.logs import LogConfig
from shardq.matrix_rows import DECODING_BYTES, RowsOfMatrix
from shardq.schemes import Scheme

if TYPE_CHECKING:
    from shardq.carry import Goal
    from shardq.dequantize.base import Encoded
    from shardq.importance_vectors import Ref
    from shardq.replaced import ReplacedRef
    from shardq.search import Search
    from shardq.tuned import TunedRef

TILE_BYTES = 1 << 20  # source bytes held at once: fits a core's second-level cache with its codes
SLAB_BYTES = 64 << 20  # source bytes of the largest task; fixed, so that plans do not depend on the machine
SEAL_BYTES = 3 << 20  # of finished files held at once: of each as much as a disk is well given at a time
READ_BACK_BYTES = 24  # for each weight of a tile: fp32 values as written and as read, scales, copies
SPAN_BYTES = SLAB_BYTES  # source bytes that range mode holds in one piece; no task reaches over two


@dataclass(frozen=True, slots=True)
class Target:
    """One output tensor of a module and where it lies in its file."""

    suffix: str
    dtype: str  # safetensors tag
    shape: tuple[int, ...]  # of the whole tensor
    begin: int  # offset of its first byte in the output file


@dataclass(frozen=True, slots=True)
class QuantizeTask(RowsOfMatrix):
    """Quantize rows `row` to `end_row` of one weight matrix and write them into its module's tensors; or, of a matrix
    that the source has encoded, only decode them."""

    kind: ClassVar[str] = "quantize"
    id: int
    shard: str  # source shard
    file: str  # output file
    tensor: str  # name of the weight, for messages
    dtype: str  # of the weight
    begin: int  # offset of the whole matrix in the source shard; of an encoded one that of the first code of the rows
    rows: int  # of the whole matrix
    columns: int
    row: int
    end_row: int
    scheme: Scheme | None  # None: the rows are written as they are decoded
    layout: str
    targets: tuple[Target, ...]
    reads_back: bool = False  # its figures are of what is written, as the layout keeps no codes
    amax: float | None = None  # see quantizers.rtn; filled in when it is known
    amax_of: str = ""  # the tensor that has it, for messages
    encoded: "Encoded | None" = None  # how the rows are made, where they are not there as they are
    span_bytes: int = 0  # of an encoded matrix: from the first code of the rows to the last
    rounds: bool = False  # decoded rows are rounded to `dtype` first
    turned: bool = False  # written as columns: only of what is not quantized
    goal: "Goal | None" = None  # codes are carried there as they are, not made anew
    search: "Search | None" = None  # for better scales
    importance: "Ref | None" = None  # how much an error counts in each column
    tuned: "TunedRef | None" = None  # codes that were tuned are packed, not made anew

    @property
    def files(self) -> tuple[str, ...]:
        """Output files that it writes into."""
        return (self.file,)

    @property
    def output_bytes(self) -> int:
        """Bytes that it writes, but for what is written once for all slabs."""
        return sum(_size(t) for t in self.targets) * (self.end_row - self.row) // self.rows


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes of one tensor, or a part of them, that are copied as they are, or replaced by as many others."""

    tensor: str
    begin: int  # in the source shard
    target: int  # in the output file
    size_bytes: int
    strip_bytes: int = TILE_BYTES  # checksummed at once; of a matrix whole rows, so few that any tile ends with one
    replaced: "ReplacedRef | None" = None  # what is written in their place

    @property
    def step_bytes(self) -> int:
        """What is read and written at once: as many strips as a tile holds, at least one."""
        return max(1, TILE_BYTES // self.strip_bytes) * self.strip_bytes


@dataclass(frozen=True, slots=True)
class CopyTask:
    """Copy some tensors of one shard unchanged."""

    kind: ClassVar[str] = "copy"
    id: int
    shard: str
    file: str
    pieces: tuple[Piece, ...]

    @property
    def files(self) -> tuple[str, ...]:
        """As of QuantizeTask."""
        return (self.file,)

    @property
    def shards(self) -> frozenset[str]:
        """As of QuantizeTask."""
        return frozenset({self.shard})

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


Task = QuantizeTask | CopyTask | BlocksTask | VectorsTask
RowsTask = QuantizeTask | BlocksTask  # those that tiles of a matrix are made for


@dataclass(frozen=True, slots=True)
class Done:
    """What became of a QuantizeTask or CopyTask."""

    id: int
    checksum: int  # kernels.checksum of the written bytes, arrays in target order
    figures: Figures  # all 0 for a copy
    reused: bool  # the bytes were there already
    amax: float | None = None  # that of the task: with another one the bytes would be others
    losses: Losses | None = None  # of a search


@dataclass(frozen=True, slots=True)
class Member:
    """One output's part in a bundle."""

    lane: int  # which output
    task: Task
    before: Done | None = None  # of an interrupted run: done again only when the bytes on disk have another checksum


@dataclass(frozen=True, slots=True)
class Bundle:
    """What the outputs of a run make of the same source bytes, which are read once. Its members have equal extents."""

    id: int  # that of its tasks
    members: tuple[Member, ...]
    bond: str = ""  # bundles of a shard with the same bond wait for each other's largest magnitude

    @property
    def shard(self) -> str:
        """The source shard."""
        return self.members[0].task.shard

    @property
    def tensor(self) -> str:
        """Name of the first tensor, for messages."""
        return self.members[0].task.tensor

    @property
    def shards(self) -> frozenset[str]:
        """All source shards that it reads."""
        return self.members[0].task.shards

    @property
    def source_bytes(self) -> int:
        """As of its tasks."""
        return self.members[0].task.source_bytes

    @property
    def extent(self) -> tuple[int, int]:
        """The first byte in the source shard that it reads, and the byte behind the last."""
        return self.members[0].task.extent

    @property
    def quantize_tasks(self) -> tuple[QuantizeTask, ...]:
        """Those of its members that quantize into tensors of their own."""
        return tuple(m.task for m in self.members if isinstance(m.task, QuantizeTask))

    @property
    def block_tasks(self) -> tuple[BlocksTask, ...]:
        """Those of its members that write blocks."""
        return tuple(m.task for m in self.members if isinstance(m.task, BlocksTask))

    @property
    def rows_tasks(self) -> tuple[RowsTask, ...]:
        """All that tiles of the matrix are read for; none where tensors are only copied, or are vectors."""
        return (*self.quantize_tasks, *self.block_tasks)

    @property
    def key(self) -> int:
        """As of the SurveyTask of the same rows."""
        first = self.rows_tasks[0]
        return first.row if first.encoded else first.extent[0]

    @property
    def tile_rows(self) -> int:
        """Rows quantized at once: a multiple of 32 and of the rows that share a scale, as make about TILE_BYTES.
        Decoded rows count as 8 bits: what is done once for each tile weighs more than a cache that is left."""
        first = self.rows_tasks[0]
        unit = math.lcm(32, *(t.scheme.group_rows for t in self.quantize_tasks if t.scheme))
        row_bytes = first.row_bytes // (4 if first.encoded else 1)
        return max(unit, TILE_BYTES // row_bytes // unit * unit)

    @property
    def cost_bytes(self) -> int:
        """Memory while it runs: a tile of source, one widened row, and for each output that quantizes the slab's
        arrays, figures of each row, and the codes, words and scales of a tile, wide where they are read back."""
        if not self.rows_tasks:
            return max(_small_bytes(m.task) for m in self.members)
        first, tasks = self.rows_tasks[0], self.quantize_tasks
        tile = min(self.tile_rows, first.end_row - first.row)
        groups = sum(t.scheme.groups(t.columns) for t in tasks if t.scheme)
        numbers = 2 * FIGURES + WEIGHED  # of each row: as quantized, as read back, and of a search
        figures = 8 * numbers * (first.end_row - first.row) * len(tasks)
        own = figures + sum(t.output_bytes for t in tasks) + tile * (40 * groups + first.columns * len(tasks))
        wide = READ_BACK_BYTES * tile * first.columns if any(t.reads_back for t in tasks) else 0
        wide += 4 * tile * first.columns if any(t.tuned and t.tuned.is_scaled for t in tasks) else 0
        own += first.decoding_bytes(tile) + sum(t.memory_bytes(tile) for t in self.block_tasks)
        return own + wide + tile * (first.row_bytes + first.columns) + 4 * first.columns + (1 << 20)


@dataclass(frozen=True, slots=True)
class BundleDone:
    """What a worker reports of a Bundle: lane and report of each member."""

    id: int
    done: tuple[tuple[int, Done], ...]


@dataclass(frozen=True, slots=True)
class SurveyTask:
    """Find the largest magnitude of some rows of a matrix, for schemes that must know it before the first code."""

    kind: ClassVar[str] = "survey"
    shard: str
    tensor: str
    dtype: str
    begin: int  # of the rows in the source shard; of an encoded matrix of their first code
    size_bytes: int
    columns: int
    row: int = 0
    end_row: int = 0
    encoded: "Encoded | None" = None
    rounds: bool = False  # see QuantizeTask
    goal: "Goal | None" = None  # the largest scale is wanted, of codes that are carried there

    @property
    def key(self) -> int:
        """Tells it from others of its tensor."""
        return self.row if self.encoded else self.begin

    @property
    def extent(self) -> tuple[int, int]:
        """As of QuantizeTask."""
        return self.begin, self.begin + self.size_bytes

    @property
    def cost_bytes(self) -> int:
        """Memory while it runs."""
        if self.encoded is None:
            return 2 * TILE_BYTES
        rows = min(self.end_row - self.row, max(1, TILE_BYTES // (4 * self.columns)))
        stored = self.encoded.window_bytes(self.row, self.end_row if self.encoded.is_strided else self.row + rows)
        return 2 * TILE_BYTES + 2 * stored + DECODING_BYTES * rows * self.columns


@dataclass(frozen=True, slots=True)
class Surveyed:
    """What a worker reports of a SurveyTask."""

    tensor: str
    key: int  # of the task
    amax: float  # infinite where a weight is NaN or infinite


@dataclass(frozen=True, slots=True)
class Streamed:
    """Work whose source bytes are in memory, not in a file of their own."""

    work: Bundle | SurveyTask
    path: str  # where a process opens the memory
    origin: int  # offset in the source shard of the memory's first byte
    extent: tuple[int, int] = (0, 0)  # the shard's bytes that are there; companions outside of it are lent


@dataclass(frozen=True, slots=True)
class Unsealed:
    """A finished output file."""

    lane: int
    file: str
    size_bytes: int
    keeps: bool = False  # also when the disk fails: it may be all that is left of settled shards


@dataclass(frozen=True, slots=True)
class SealTask:
    """Make finished output files durable and take the sha256 of each."""

    kind: ClassVar[str] = "seal"
    files: tuple[Unsealed, ...]

    @property
    def lanes(self) -> frozenset[int]:
        """Outputs that these are files of."""
        return frozenset(f.lane for f in self.files)


@dataclass(frozen=True, slots=True)
class SettleTask:
    """Make what is in unfinished output files durable, so that a source shard that is all in them may go."""

    kind: ClassVar[str] = "settle"
    lane: int
    shard: str
    files: tuple[str, ...]

    @property
    def lanes(self) -> frozenset[int]:
        """As of SealTask."""
        return frozenset({self.lane})


@dataclass(frozen=True, slots=True)
class Settled:
    """What a worker reports of a SettleTask."""

    lane: int
    shard: str


@dataclass(frozen=True, slots=True)
class Sealed:
    """A file that is durable."""

    lane: int
    file: str
    sha256: str


@dataclass(frozen=True, slots=True)
class SealDone:
    """What a worker reports of a SealTask."""

    files: tuple[Sealed, ...]


@dataclass(frozen=True, slots=True)
class Workplace:
    """Where a run's files are; the same for all its tasks."""

    sources: Mapping[str, str]  # shard -> path of a readable file
    parts: tuple[str, ...]  # folder of unfinished output files, by lane
    keeps_memory: bool  # workers keep a task's memory for the next one: only where all may have the largest task's
    log: LogConfig | None
    fetched: str = ""  # folder of source shards that a download has written
    lent: str = ""  # folder of what streamed shards borrow: a folder for each, with a file for each donor


def _small_bytes(task: Task) -> int:
    """Memory for tensors that are no rows of a matrix."""
    if isinstance(task, VectorsTask):
        return TILE_BYTES + task.memory_bytes
    pieces = task.pieces if isinstance(task, CopyTask) else ()
    replacing = max((p.step_bytes for p in pieces if p.replaced), default=0)
    return TILE_BYTES + max(TILE_BYTES, *(p.step_bytes for p in pieces)) + replacing


def _size(t: Target) -> int:
    n = STORAGE[t.dtype].bits // 8
    for d in t.shape:
        n *= d
    return n
