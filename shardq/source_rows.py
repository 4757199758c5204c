"""Rows of a weight from a source that is read by ranges, as a worker takes them: as they are stored, or decoded.

What is read is known from headers alone. Codes that lie in rows are read row by row. Where rows are columns of what is
stored (GPTQ, AWQ, turned stacks), some of them would be a little of every line: whole lines are read instead, of as
many columns as are asked for. The others are zeros then.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from shardq.carry import Goal
from shardq.carry_codes import carry_rows, largest_scale
from shardq.checkpoint import TensorRef
from shardq.decoded import keep_rows, round_rows
from shardq.dequantize.base import Encoded, Part
from shardq.dequantize.decoding import Ranges, decode_rows, read_parts
from shardq.dequantize.values import ARRAYS
from shardq.errors import CorruptShard, NonFiniteWeight, NotExact
from shardq.formats import STORAGE
from shardq.kernels import KernelSet
from shardq.making import WEIGHT_ARRAYS
from shardq.quantizers.quantized import Quantized
from shardq.sources.base import Source

WINDOW_BYTES: Final = 8 << 20  # read at once

Span = tuple[int, int]


class NoRowsError(Exception):
    """Rows that decode to no numbers, or to none that can be carried; the text says how."""


class SourceRows:
    """One matrix of the source."""

    def __init__(
        self,
        t: TensorRef,
        e: Encoded | None,
        rounded: bool,
        source: Source,
        kernels: KernelSet,
        columns: Span | None = None,
        goal: Goal | None = None,
    ) -> None:
        """`e`: one of those of `t`, None where it has none. `rounded`: decoded rows are rounded to its type before they
        are quantized. `columns`: the first that is asked for, and the one behind the last; None: all. `goal`: where
        codes are carried."""
        assert t.dtype is not None
        assert t.shape is not None
        self._t, self._e, self._dtype, self._columns = t, e, t.dtype, e.columns if e else t.shape[1]
        self._rounds = e is not None and goal is None and e.rounds(rounded)
        self._goal = goal
        self._source, self._kernels = source, kernels
        self._asked = columns or (0, self._columns)
        self._held: dict[str, NDArray[Any]] | None = None  # windows of all rows, where they run along lines
        self._common: dict[str, NDArray[np.uint8]] = {}  # what any row needs
        self._window: tuple[Span, dict[str, NDArray[Any]]] | None = None  # the present one
        if e is not None and e.is_strided:
            self._held = {p.role: self._lines(e, p) for p in e.parts}

    def taken(self, row: int, end_row: int) -> tuple[NDArray[Any], str]:
        """Rows as kernels take them, and their type. Raises NoRowsError, and what reading raises."""
        if self._e is None:
            t, row_bytes = self._t, self._columns * STORAGE[self._dtype].bits // 8
            raw = self._source.read(t.shard, t.begin + row * row_bytes, t.begin + end_row * row_bytes)
            return np.frombuffer(raw, WEIGHT_ARRAYS[self._dtype]).reshape(-1, self._columns), self._dtype
        rows = self._decoded(self._e, row, end_row)
        return (round_rows(rows, self._dtype), self._dtype) if self._rounds else (rows, "F32")

    def kept(self, row: int, end_row: int) -> NDArray[Any]:
        """Decoded rows as they are written where they are kept. Raises as `taken`."""
        assert self._e is not None
        return keep_rows(self._e, self._decoded(self._e, row, end_row), self._dtype, self._kernels)

    def carried(self, row: int, end_row: int, largest: float | None) -> Quantized:
        """Rows with the codes that they have; `largest` as of `carry_rows`. Raises as `taken`."""
        assert self._e is not None
        assert self._goal is not None
        parts = self._parts(self._e, row, end_row)
        with deriving():
            return carry_rows(self._e, parts, row, end_row, self._goal, self._kernels, largest)

    def stored(self, row: int, end_row: int) -> dict[str, NDArray[Any]]:
        """What encoded rows are made of, as `read_parts` has it. Raises what reading raises."""
        assert self._e is not None
        return self._parts(self._e, row, end_row)

    def largest(self, row: int, end_row: int) -> float:
        """The largest magnitude of rows, infinite for NaN, or where codes are carried the largest scale. Raises as
        `taken`."""
        if self._e is not None and self._goal is not None:
            parts = self._parts(self._e, row, end_row)
            with deriving():
                return largest_scale(self._e, parts, row, end_row, self._goal, self._kernels)
        rows, dtype = self.taken(row, end_row)
        found = np.empty((len(rows), 1), np.float32)
        self._kernels.group_absmax(rows, dtype, rows.shape[1], found)
        return float(found.max(initial=0))

    def _parts(self, e: Encoded, row: int, end_row: int) -> dict[str, NDArray[Any]]:
        if self._held is not None:
            return {p.role: self._narrowed(e, p, self._held[p.role], row, end_row) for p in e.parts}
        if self._window is None or self._window[0] != (row, end_row):
            self._window = (row, end_row), read_parts(e, row, end_row, self._read)
        return self._window[1]

    def _decoded(self, e: Encoded, row: int, end_row: int) -> NDArray[np.float32]:
        out = np.empty((end_row - row, e.columns), np.float32)
        parts = self._parts(e, row, end_row)
        with deriving():
            decode_rows(e, parts, row, end_row, out, self._kernels)
        if self._held is not None:
            out[:, : self._asked[0]] = out[:, self._asked[1] :] = 0
        return out

    def _read(self, part: Part, ranges: Ranges) -> NDArray[np.uint8]:
        if part.axis is None and part.role in self._common:
            return self._common[part.role]
        data = np.empty(sum(end - begin for begin, end in ranges), np.uint8)
        at = 0
        for begin, end in windows_of(ranges):
            data[at : at + end - begin] = np.frombuffer(self._source.read(part.shard, begin, end), np.uint8)
            at += end - begin
        if part.axis is None:
            self._common[part.role] = data
        return data

    def _lines(self, e: Encoded, part: Part) -> NDArray[Any]:
        """The window of all rows, of those lines that are asked for."""
        rows = e.stored_range(0, e.rows)
        if part.axis != 1:
            return e.shaped(part, self._read(part, part.reads(*rows)), 0, e.rows)
        left, right = part.window(*rows)
        lines = self._read(part, [_lines_span(e, part, self._asked)]).view(ARRAYS[part.dtype])
        return lines.reshape(-1, part.width)[:, left:right]

    def _narrowed(self, e: Encoded, part: Part, held: NDArray[Any], row: int, end_row: int) -> NDArray[Any]:
        """The window of some rows. Lines that were not read are zeros, or where codes are carried as the first that
        was: zeros are not always codes and scales that can be."""
        origin = part.window(*e.stored_range(0, e.rows))[0]
        left, right = (at - origin for at in part.window(*e.stored_range(row, end_row)))
        if part.axis != 1:
            return held[left:right]
        first, behind = _lines_of(e, part, self._asked)
        found = np.zeros((part.lines, right - left), held.dtype)
        found[first:behind] = held[:, left:right]
        if self._goal is not None:
            found[:first] = found[behind:] = found[first]
        return found


@contextmanager
def deriving() -> Iterator[None]:
    """Around what reads nothing: the source is as it is, and no error of reading. Raises NoRowsError."""
    try:
        yield
    except (NonFiniteWeight, NotExact, CorruptShard) as e:
        raise NoRowsError(str(e)) from e


def encoded_reads(e: Encoded, columns: Span, windows: Sequence[Span]) -> Iterator[Span]:
    """The byte ranges that SourceRows reads for some windows of rows."""
    if e.is_strided:
        for p in e.parts:
            everything = p.reads(*e.stored_range(0, e.rows))
            yield from windows_of([_lines_span(e, p, columns)] if p.axis == 1 else everything)
        return
    for number, window in enumerate(windows):
        for p, ranges in e.reads(*window):
            if p.axis is not None or number == 0:
                yield from windows_of(ranges)


def margin_bytes(e: Encoded) -> int:
    """What a few rows, or columns where these are lines, may cost beyond their share: a line of each part that has one
    for several of them, and what any row needs."""
    along = [p for p in e.parts if p.axis == (1 if e.is_strided else 0) and (e.is_strided or p.per_rows > 1)]
    common = 0 if e.is_strided else sum(p.window_bytes(0, 1) for p in e.parts if p.axis is None)
    return common + sum(p.width * STORAGE[p.dtype].bits // 8 for p in along)


def windows_of(ranges: Ranges) -> Iterator[Span]:
    """Ranges, the large ones in windows."""
    for begin, end in ranges:
        for at in range(begin, end, WINDOW_BYTES):
            yield at, min(end, at + WINDOW_BYTES)


def _lines_of(e: Encoded, part: Part, columns: Span) -> Span:
    """Lines that have something of these columns, the first and the one behind the last; of scales all lines where any
    column may belong to any group."""
    if part.role != "codes" and e.part("groups") is not None:
        return 0, part.lines
    left, right = columns
    short = e.columns % part.lines != 0 and part.role != "codes"  # the last group is: others are wider than the mean
    return max(0, left * part.lines // e.columns - short), -(-right * part.lines // e.columns)


def _lines_span(e: Encoded, part: Part, columns: Span) -> Span:
    line_bytes = part.width * STORAGE[part.dtype].bits // 8
    first, behind = _lines_of(e, part, columns)
    return part.begin + first * line_bytes, part.begin + behind * line_bytes
