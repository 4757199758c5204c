"""What is known of an encoded weight before a byte of it is read: its shape, the arrays that it is made of, and which
bytes of them some of its rows need. Frozen, small, and fit to cross a process border."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, Literal, Protocol

from shardq.checkpoint import TensorRef
from shardq.formats import STORAGE

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from shardq.dequantize.hints import Hints
    from shardq.kernels import KernelSet
    from shardq.quantizers.quantized import Quantized

    Arrays = Mapping[str, NDArray[Any]]  # role -> window of a part

Trait = Literal["refused", "unpaired", "leftover", "shapes"]
WORD_BITS: Final = 32
PLAIN: Final = "plain"  # a kind that no source of families.toml has: nothing is to be detected (plain.py)


@dataclass(frozen=True, slots=True)
class Part:
    """One array that rows are made of: a tensor of the source, or one slice of a stack, as lines of elements."""

    role: str  # codes, scale, zeros, biases, factor, ...: see companion_roles in families.toml
    tensor: str
    shard: str
    dtype: str  # safetensors tag
    begin: int  # offset of its first byte in the shard
    lines: int
    width: int  # elements of a line
    axis: Literal[0, 1] | None  # rows of the weight run along lines (0) or along a line (1); None: any row needs all
    units: int = 1  # this many lines, or elements of a line, are
    per_rows: int = 1  # this many rows of the weight

    def window(self, row: int, end_row: int) -> tuple[int, int]:
        """First line (or element of each line) that rows `row` to `end_row` need, and the one behind the last."""
        if self.axis is None:
            return 0, self.lines
        size = self.lines if self.axis == 0 else self.width
        return row * self.units // self.per_rows, min(size, -(-end_row * self.units // self.per_rows))

    def reads(self, row: int, end_row: int) -> tuple[tuple[int, int], ...]:
        """The byte ranges of the shard, begin and end, that hold the window, in order: one, or one for each line."""
        first, behind = self.window(row, end_row)
        item_bytes = STORAGE[self.dtype].bits // 8
        line_bytes = self.width * item_bytes
        if self.axis != 1:
            return ((self.begin + first * line_bytes, self.begin + behind * line_bytes),)
        if (first, behind) == (0, self.width):
            return ((self.begin, self.begin + self.lines * line_bytes),)
        starts = range(self.begin + first * item_bytes, self.begin + self.lines * line_bytes, line_bytes)
        return tuple((at, at + (behind - first) * item_bytes) for at in starts)

    def extent(self, row: int, end_row: int) -> tuple[int, int]:
        """The first byte of the window in the shard, and the byte behind its last."""
        first, behind = self.window(row, end_row)
        item_bytes = STORAGE[self.dtype].bits // 8
        line_bytes = self.width * item_bytes
        if self.axis != 1:
            return self.begin + first * line_bytes, self.begin + behind * line_bytes
        return self.begin + first * item_bytes, self.begin + (self.lines - 1) * line_bytes + behind * item_bytes

    def window_bytes(self, row: int, end_row: int) -> int:
        """Bytes of the window: never more than the part."""
        first, behind = self.window(row, end_row)
        across = self.width if self.axis != 1 else self.lines
        return (behind - first) * across * STORAGE[self.dtype].bits // 8

    def shaped(self, data: "NDArray[Any] | bytes | memoryview", row: int, end_row: int) -> "NDArray[Any]":
        """The bytes of the window, as `reads` has them one behind the other, as a matrix: [lines of it, width] or
        [lines, elements of it]. Floats that numpy lacks are bit patterns. Raises ValueError for a wrong size."""
        import numpy as np

        from shardq.dequantize.values import ARRAYS

        first, behind = self.window(row, end_row)
        shape = (self.lines, behind - first) if self.axis == 1 else (behind - first, self.width)
        return np.frombuffer(data, ARRAYS[self.dtype]).reshape(shape)


@dataclass(frozen=True, slots=True)
class Scaling:
    """What decoded rows and columns are multiplied by, so that a neighbour can be divided by the same: a fold.

    Powers of two, which change no digit of a float; `factors` instead for the columns where these cannot be.
    """

    rows: bytes = b""  # exponents, int8, one for each row; empty: none
    columns: bytes = b""  # likewise for each column
    factors: bytes = b""  # fp32, little-endian, one for each column, in place of `columns`
    added: float = 0.0  # to weights before they are multiplied, and taken off again: norms that multiply by 1 + w

    @property
    def is_exact(self) -> bool:
        """True if the result has the digits of what is decoded."""
        return not self.factors and not self.added


@dataclass(frozen=True, slots=True)
class Encoded:
    """One weight matrix [rows, columns], or one slice of a stack, that the source stores as codes."""

    name: str  # of the weight were it not encoded: `a.b.weight`, or a raw parameter's own name
    kind: str  # a source of families.toml
    index: int | None  # its place in a stack; None for a matrix
    rows: int
    columns: int
    dtype: str  # BF16 or F16, or F32: what the source's own reader makes of it
    parts: tuple[Part, ...]  # the first has the codes
    element: str  # of one code, as kernels call it; `nf4` and `fp4` bring their values along
    block: tuple[int, int]  # rows and columns of the stored matrix that share a scale
    zero_added: int = 0  # what readers add to a stored zero point
    offset: float = 0.0  # what readers add to a decoded scale
    pick: tuple[int, int, int] | None = None  # stored rows that are its rows: start, stop, step; None: all
    transposed: bool = False  # stored as [columns, rows]
    scaling: Scaling | None = None  # what its own rows and columns are multiplied by, after all the above

    def part(self, role: str) -> Part | None:
        """The part of this role, if it has one."""
        return next((p for p in self.parts if p.role == role), None)

    def picked(self, start: int, stop: int, step: int = 1) -> "Encoded":
        """Some of its rows as a matrix of their own: a half, or every second one. `step` is positive."""
        mine = (self.span if self.pick is None else range(*self.pick))[start:stop:step]
        if step < 1 or not mine:
            raise ValueError(f"{self.name}: no rows in {start}:{stop}:{step} of {self.rows}")
        return replace(self, rows=len(mine), pick=(mine.start, mine.stop, mine.step))

    def turned(self) -> "Encoded":
        """The transpose: rows are the columns that it has stored. Only for elements of whole bytes, not yet picked."""
        if self.pick is not None or self.transposed or self.element not in TURNABLE:
            raise ValueError(f"{self.name}: {self.element} codes cannot be turned")
        parts = tuple(_turned(p, self) for p in self.parts)
        return replace(self, rows=self.columns, columns=self.rows, parts=parts, transposed=True)

    @property
    def span(self) -> range:
        """Stored rows that are its rows."""
        return range(self.rows) if self.pick is None else range(*self.pick)

    def stored_range(self, row: int, end_row: int) -> tuple[int, int]:
        """Stored rows that hold rows `row` to `end_row`; those between its own are included."""
        mine = self.span[row:end_row]
        return mine[0], mine[-1] + 1

    def reads(self, row: int, end_row: int) -> tuple[tuple[Part, tuple[tuple[int, int], ...]], ...]:
        """For each part the byte ranges of its shard that rows `row` to `end_row` need."""
        first, behind = self.stored_range(row, end_row)
        return tuple((p, p.reads(first, behind)) for p in self.parts)

    def shaped(self, part: Part, data: "NDArray[Any] | bytes | memoryview", row: int, end_row: int) -> "NDArray[Any]":
        """See Part.shaped; rows are those of this matrix."""
        return part.shaped(data, *self.stored_range(row, end_row))

    def window_bytes(self, row: int, end_row: int) -> int:
        """Bytes of all windows that rows `row` to `end_row` need; decoding takes up to 13 more for each stored element
        of them, beside the fp32 result: 1 for codes, 4 where rows are picked with a step or turned, 8 for act-order."""
        first, behind = self.stored_range(row, end_row)
        return sum(p.window_bytes(first, behind) for p in self.parts)

    def rounds(self, rounded: bool) -> bool:
        """True if rows are rounded to the type of their weight before they are quantized: as by --decode `rounded`, and
        where that changes nothing, so that the codes are those of weights which are stored so (F16 has few
        exponents)."""
        is_same = self.scaling is None or (self.scaling.is_exact and self.dtype != "F16")
        return rounded or (self.kind == PLAIN and is_same)

    @property
    def source_bytes(self) -> int:
        """Bytes of all parts that its rows need."""
        return self.window_bytes(0, self.rows)

    def share_bytes(self, rows: int) -> int:
        """Bytes of the codes of so many rows; those between them belong to others."""
        codes = self.parts[0]
        across = codes.width if codes.axis == 0 else codes.lines
        return rows * codes.units * across * STORAGE[codes.dtype].bits // (8 * codes.per_rows)

    def codes_extent(self, row: int, end_row: int) -> tuple[int, int]:
        """The first byte of its shard that rows `row` to `end_row` need of the codes, and the byte behind the last."""
        return self.parts[0].extent(*self.stored_range(row, end_row))

    @property
    def is_strided(self) -> bool:
        """True if its rows run along the lines that are stored, so that some of them are a range of each line."""
        return self.parts[0].axis == 1


TURNABLE: Final = frozenset({"e4m3fn", "e5m2", "e4m3fnuz", "e5m2fnuz", "int8", "plain"})


def _turned(part: Part, e: Encoded) -> Part:
    if part.role == "codes":
        return replace(part, axis=1)
    if part.axis is None:
        return part
    return replace(part, axis=1, per_rows=e.block[1])


@dataclass(frozen=True, slots=True)
class Coded:
    """Canonical codes of some rows, for layouts that hold the same numbers."""

    element: str
    group: int  # columns that share a scale
    values: "Quantized"  # scales are fp32; of floats in blocks each row has its own


@dataclass(frozen=True, slots=True)
class Module:
    """The tensors of one encoded weight or stack, by role, as they were found."""

    name: str
    kind: str
    refs: Mapping[str, TensorRef]
    hints: "Hints"
    peeked: Mapping[str, bytes]  # content of tensors that tell shapes


@dataclass(frozen=True, slots=True)
class Mismatch:
    """Why a module cannot be described: shapes that do not go together, or a form that has no reader."""

    trait: Trait
    tensor: str
    reason: str


@dataclass(frozen=True, slots=True)
class Wanted:
    """A small tensor whose content must be known first."""

    tensor: TensorRef


Description = tuple[Encoded, ...] | Mismatch | Wanted


class Reader(Protocol):
    """How one kind of source is read."""

    def describe(self, module: Module) -> Description:
        """The matrices of a module, by headers alone; several for a stack."""
        ...

    def decode(
        self, e: Encoded, parts: "Arrays", row: int, end_row: int, out: "NDArray[Any]", kernels: "KernelSet"
    ) -> None:
        """Stored rows `row` to `end_row` as fp32, to out [end_row - row, columns]; each operation rounded once. What is
        no number is decoded as NaN or infinity."""
        ...

    def codes(self, e: Encoded, parts: "Arrays", row: int, end_row: int, kernels: "KernelSet") -> Coded | None:
        """Canonical codes of stored rows; None where this kind has none."""
        ...
