"""What all tasks have that read some rows of a weight matrix."""

from typing import TYPE_CHECKING, Final

from shardq.formats import STORAGE

if TYPE_CHECKING:
    from shardq.dequantize.base import Encoded

DECODING_BYTES: Final = 21  # for each weight of a tile that is decoded: fp32 values twice, and what the readers take


class RowsOfMatrix:
    """Fields are those of the task, see tasks.QuantizeTask; this has what follows from them."""

    __slots__ = ()
    shard: str
    tensor: str
    dtype: str
    begin: int
    columns: int
    row: int
    end_row: int
    encoded: "Encoded | None"
    span_bytes: int

    @property
    def shards(self) -> frozenset[str]:
        """All source shards that it reads."""
        return frozenset({self.shard, *(p.shard for p in self.encoded.parts)} if self.encoded else {self.shard})

    @property
    def row_bytes(self) -> int:
        """Bytes of one row as kernels read it."""
        return self.columns * (4 if self.encoded else STORAGE[self.dtype].bits // 8)

    @property
    def source_bytes(self) -> int:
        """Source bytes that this task stands for: those that it reads, but for companions and what others share."""
        if self.encoded:
            return self.encoded.share_bytes(self.end_row - self.row)
        return (self.end_row - self.row) * self.row_bytes

    @property
    def extent(self) -> tuple[int, int]:
        """The first byte in the source shard that it reads, and the byte behind the last; of companions none."""
        if self.encoded:
            return self.begin, self.begin + self.span_bytes
        return self.begin + self.row * self.row_bytes, self.begin + self.end_row * self.row_bytes

    def decoding_bytes(self, rows: int) -> int:
        """Memory for decoding so many rows at once, beside the result: what is stored of them, or of the whole slab
        where each of its lines has some of every row."""
        e = self.encoded
        if e is None:
            return 0
        first, behind = e.stored_range(self.row, self.row + rows)
        stored = e.window_bytes(self.row, self.end_row if e.is_strided else self.row + rows)
        return 2 * stored + DECODING_BYTES * (behind - first) * self.columns
