"""Units of work of a GGUF file: which rows of a weight become which rows of the file, in blocks of ggml. One unit may
write into several tensors, and into several files."""

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar, Final

from shardq.figures import FIGURES
from shardq.formats import STORAGE
from shardq.ggml import GGML, row_bytes
from shardq.matrix_rows import RowsOfMatrix

if TYPE_CHECKING:
    from collections.abc import Collection

    from shardq.dequantize.base import Encoded
    from shardq.importance_vectors import Ref
    from shardq.regrouping import Regrouping

PLAIN_TYPES: Final = ("F32", "F16", "BF16")  # types without blocks
FP32: Final = 4  # bytes


@dataclass(frozen=True, slots=True)
class Take:
    """Some rows of a weight that are the rows of one matrix in a file; of a vector its elements."""

    tensor: str  # in the file, for messages
    file: str
    begin: int  # offset in the file of the matrix, which may be a slice of a tensor
    type: str  # key of ggml.GGML
    rows: range  # of the weight, in the matrix's order
    order: "Regrouping | None" = None  # in which the matrix has them then
    column_order: "Regrouping | None" = None  # likewise; with its rows in order
    turned: bool = False  # columns of the weight are the matrix's rows; all `rows` lie in one task then
    added: float = 0.0  # to each element first, in fp32
    negative_exp: bool = False  # of a vector -exp of each element, in fp32
    importance: "Ref | None" = None  # how much an error counts in each column
    carried: bool = False  # codes of the source are kept
    narrowed: bool = False  # each element is rounded to BF16 first, half to even

    @property
    def is_quantized(self) -> bool:
        """False for plain floats."""
        return self.type not in PLAIN_TYPES

    def row_bytes(self, columns: int) -> int:
        """Bytes of a row of the matrix, made of a weight with so many columns."""
        return row_bytes(GGML[self.type], len(self.rows) if self.turned else columns)

    def within(self, row: int, end_row: int) -> range:
        """Those of its rows from `row` to `end_row`, as positions in `rows`; steps are positive."""
        first = -(-(row - self.rows.start) // self.rows.step)
        behind = -(-(end_row - self.rows.start) // self.rows.step)
        return range(min(max(0, first), len(self.rows)), min(max(0, behind), len(self.rows)))


@dataclass(frozen=True, slots=True)
class BlocksTask(RowsOfMatrix):
    """Rows `row` to `end_row` of one weight matrix, into all that they become in GGUF files."""

    kind: ClassVar[str] = "blocks"
    id: int
    shard: str  # source shard
    tensor: str  # name of the weight, for messages
    dtype: str  # of the weight
    begin: int  # as of tasks.QuantizeTask
    rows: int  # of the whole matrix
    columns: int
    row: int
    end_row: int
    takes: tuple[Take, ...]  # none: nothing becomes of it
    encoded: "Encoded | None" = None
    span_bytes: int = 0
    rounds: bool = False
    finished: "frozenset[str]" = field(default_factory=frozenset)  # files that are sealed: not written again

    @property
    def files(self) -> tuple[str, ...]:
        """Output files that it writes into."""
        return tuple(dict.fromkeys(t.file for t in self.takes))

    @property
    def output_bytes(self) -> int:
        """Bytes that it writes."""
        return sum(self.take_bytes(t) for t in self.takes)

    @property
    def measured_weights(self) -> int:
        """Weights whose errors are measured: those that go into blocks, each as often as it does."""
        quantized = [t for t in self.takes if t.is_quantized]
        return sum(len(t.within(self.row, self.end_row)) * self.columns for t in quantized)

    def take_bytes(self, take: Take) -> int:
        """Bytes of what it writes of a take."""
        rows = self.columns if take.turned else len(take.within(self.row, self.end_row))
        return rows * take.row_bytes(self.columns)

    def memory_bytes(self, tile: int) -> int:
        """Memory beside source and decoding, with tiles of so many rows: what is written, figures and places of all
        rows, and of a tile the rows that are taken and what they decode to, both in fp32; turned ones whole."""
        turned = [t for t in self.takes if t.turned]
        held = sum(FP32 * len(t.rows) * self.columns for t in turned)
        wide = 3 * FP32 * max([tile * self.columns, *(len(t.rows) * self.columns for t in turned)])
        rows = self.end_row - self.row
        return self.output_bytes + (8 * FIGURES + 16) * (rows + self.columns) * len(self.takes) + held + wide

    def without(self, finished: "Collection[str]") -> "BlocksTask":
        """The same, but what goes into these files is only measured."""
        return replace(self, finished=frozenset(finished))


@dataclass(frozen=True, slots=True)
class Vector:
    """One tensor of a shard that is no matrix, and what becomes of its elements: plain fp32."""

    tensor: str
    dtype: str  # of WEIGHT_DTYPES
    begin: int  # in the source shard
    count: int  # elements
    takes: tuple[Take, ...]

    @property
    def size_bytes(self) -> int:
        """Bytes in the source."""
        return self.count * STORAGE[self.dtype].bits // 8


@dataclass(frozen=True, slots=True)
class VectorsTask:
    """Some small tensors of one shard."""

    kind: ClassVar[str] = "vectors"
    id: int
    shard: str
    tensor: str  # name of the first, for messages
    source_bytes: int
    extent: tuple[int, int]  # as of tasks.CopyTask
    vectors: tuple[Vector, ...]  # those of which something becomes
    finished: "frozenset[str]" = field(default_factory=frozenset)

    @property
    def files(self) -> tuple[str, ...]:
        """As of BlocksTask."""
        return tuple(dict.fromkeys(t.file for v in self.vectors for t in v.takes))

    @property
    def shards(self) -> frozenset[str]:
        """All source shards that it reads."""
        return frozenset({self.shard})

    @property
    def memory_bytes(self) -> int:
        """Memory while it runs: of the largest what is read, and twice that in fp32."""
        return max((v.size_bytes + 2 * FP32 * v.count for v in self.vectors), default=0)

    def without(self, finished: "Collection[str]") -> "VectorsTask":
        """As of BlocksTask."""
        return replace(self, finished=frozenset(finished))
