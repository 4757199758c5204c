"""Derive one tensor's part again from the source, and compare it with what the result holds, byte for byte."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shardq.arena import Arena, reserve
from shardq.audit_magnitude import measure_rows, take
from shardq.audit_plan import Check, Span, lines, span, split
from shardq.audit_subjects import Derived
from shardq.figures import COUNTS, FIGURES
from shardq.importance_vectors import read_means, read_vector, weights_of
from shardq.kernels import KernelSet
from shardq.layouts.base import Layout
from shardq.making import TARGET_ARRAYS, write_values
from shardq.quantizers.buffers import buffer_shapes, take_buffers
from shardq.quantizers.rtn import measure_rows as measure_errors
from shardq.quantizers.rtn import quantize_rows
from shardq.replaced import read_replaced
from shardq.source_rows import NoRowsError, SourceRows
from shardq.sources.base import Source
from shardq.tuned import read_tuned
from shardq.tuned_rows import as_tuned

Bytes = NDArray[np.uint8]
Runs = list[tuple[int, Bytes]]  # first offset in the file, bytes


@dataclass(frozen=True, slots=True)
class Compared:
    """What came of one check."""

    bytes_compared: int  # of the result; up to the first window that differs
    problem: str | None  # the first byte that differs
    stats: NDArray[np.float64] | None  # figures of each row, when all rows of a quantized tensor were derived


def compare(
    check: Check, source: Source, result: Source, layout: Layout, kernels: KernelSet, magnitudes: Mapping[str, float],
    rounded: bool = False,
) -> Compared:  # fmt: skip
    """Do one check. Memory: the part of the result that is compared, and a window of the source with its codes; of a
    source that is read by columns all of what is read.

    `magnitudes`: the largest of each tensor that a derived scale needs; `rounded` as of SourceRows. Raises what reading
    raises; a difference is no error here.
    """
    if check.subject.scheme is None:
        if check.subject.encoded:
            return _compare_decoded(check, source, result, kernels)
        return _compare_copy(check, source, result)
    return _compare_quantized(check, source, result, layout, kernels, magnitudes, rounded)


def _compare_copy(check: Check, source: Source, result: Source) -> Compared:
    s = check.subject
    (derived,) = s.outputs
    compared = 0
    for begin, end in (window for read in check.reads for window in split(read)):
        at = s.begin + begin - derived.begin
        found = np.frombuffer(result.read(s.file, begin, end), np.uint8)
        if s.replaced:
            content: bytes | bytearray = read_replaced(s.replaced, begin - derived.begin, end - begin)
        else:
            content = source.read(s.shard, at, at + end - begin)
        expected = np.frombuffer(content, np.uint8)
        compared += end - begin
        if problem := _differ(check, derived, found[None], expected[None], begin, 0):
            return Compared(compared, problem, None)
    return Compared(compared, None, None)


def _compare_decoded(check: Check, source: Source, result: Source, kernels: KernelSet) -> Compared:
    """Of a stack one slice after the other, so that no more than one is in memory."""
    s, cut = check.subject, check.cut
    compared = 0
    for e, derived in zip(s.encoded, s.outputs, strict=True):
        at = span(derived, s, cut)
        runs = [(at[0], _read(result, s.file, at))]
        rows = SourceRows(s.weight, e, False, source, kernels, (cut.column, cut.end_column))
        for window in check.windows:
            try:
                made = rows.kept(*window)
            except NoRowsError as error:
                return Compared(compared, _underived(check, error), None)
            made = np.ascontiguousarray(made.T) if derived.spec.slab_axis == 1 else made
            found, expected, offset = _pair(check, derived, window, made, runs)
            compared += found.size
            if problem := _differ(check, derived, found, expected, offset, derived.line_bytes):
                return Compared(compared, problem, None)
    return Compared(compared, None, None)


def _compare_quantized(
    check: Check, source: Source, result: Source, layout: Layout, kernels: KernelSet, magnitudes: Mapping[str, float],
    rounded: bool,
) -> Compared:  # fmt: skip
    s, cut = check.subject, check.cut
    runs = [(read[0], _read(result, s.file, read)) for read in check.reads]
    amax = _magnitude(check, runs, layout, kernels, magnitudes)
    if isinstance(amax, str):
        return Compared(0, amax, None)
    stats = np.empty((cut.end_row - cut.row, FIGURES), np.float64)
    arena = Arena()
    compared = 0
    e, columns = s.encoded[0] if s.encoded else None, (cut.column, cut.end_column)
    weights = SourceRows(s.weight, e, rounded, source, kernels, columns, s.goal)
    for row, end_row in check.windows:
        part_stats = stats[row - cut.row : end_row - cut.row]
        arrays = _derive(check, (row, end_row), amax, weights, layout, kernels, arena, part_stats)
        if isinstance(arrays, str):
            return Compared(compared, arrays, None)
        for derived in s.outputs:
            made = arrays[derived.spec.suffix]
            if made.size == 0:
                continue
            found, expected, offset = _pair(check, derived, (row, end_row), made, runs)
            compared += found.size
            if problem := _differ(check, derived, found, expected, offset, derived.line_bytes):
                return Compared(compared, problem, None)
    everything = len(stats) == s.rows and (check.whole or not s.is_strided)
    return Compared(compared, None, stats if everything else None)


def _read(source: Source, file: str, wanted: Span) -> Bytes:
    """A run of bytes, read in windows: what a source returns is a copy."""
    begin, end = wanted
    run = np.empty(end - begin, np.uint8)
    for at, stop in split(wanted):
        run[at - begin : stop - begin] = np.frombuffer(source.read(file, at, stop), np.uint8)
    return run


def _magnitude(
    check: Check, runs: Runs, layout: Layout, kernels: KernelSet, magnitudes: Mapping[str, float]
) -> float | str | None:
    """What `quantize_rows` wants to know beyond the rows, or the problem with it."""
    s = check.subject
    assert s.scheme is not None
    if check.scale == "derived":
        bad = next((t for t in s.reach if not math.isfinite(magnitudes[t.name])), None)
        return _unfit(bad.name, bad.shard) if bad else max(magnitudes[t.name] for t in s.reach)
    if check.scale == "":
        return None
    taken = take(layout.unpack(_first_rows(check, runs), s.scheme, kernels), s.scheme, s.dtype)
    if taken is None:
        names = ", ".join(d.name for d in s.outputs if d.spec.slab_axis is None)
        return f"{names} in {s.file} is no scale that any weights would get"
    return taken


def _first_rows(check: Check, runs: Runs) -> dict[str, NDArray[Any]]:
    """The result's arrays for the first rows of a cut."""
    s, cut = check.subject, check.cut
    end_row = min(cut.end_row, cut.row + s.unit_rows)
    arrays: dict[str, NDArray[Any]] = {}
    for d in s.outputs:
        assert d.spec.slab_axis != 1, f"{d.name} keeps columns together and has a scale of all"
        first, last = lines(d, s, replace(cut, end_row=end_row))
        begin = d.begin + first * d.line_bytes
        held = _held((begin, begin + (last - first) * d.line_bytes), runs)
        arrays[d.spec.suffix] = held.view(TARGET_ARRAYS[d.spec.dtype]).reshape(last - first, *d.spec.shape[1:])
    return arrays


def _unfit(name: str, shard: str) -> str:
    return f"{name} in source shard {shard} holds weights that cannot be quantized: nothing to derive"


def _underived(check: Check, error: NoRowsError) -> str:
    return f"{check.subject.name} cannot be derived: {error}"


def _derive(
    check: Check, window: Span, amax: float | None, source: SourceRows, layout: Layout, kernels: KernelSet,
    arena: Arena, stats: NDArray[np.float64],
) -> dict[str, NDArray[Any]] | str:  # fmt: skip
    """What a worker would write for these rows: by the same quantizer, or of the same tuned codes, in the same layout.
    A text says why there is none."""
    s, (row, end_row) = check.subject, window
    assert s.scheme is not None
    try:
        weights, dtype = source.taken(row, end_row)
    except NoRowsError as error:
        return _underived(check, error)
    rows = len(weights)
    if check.scale == "taken" and amax is not None and amax < (found := measure_rows(weights, dtype, kernels)):
        names = ", ".join(d.name for d in s.outputs if d.spec.slab_axis is None)
        return f"{names} in {s.file} is the scale of magnitudes up to {amax!r}: {s.name} has one of {found!r}"
    if s.tuned:
        part = read_tuned(s.tuned, row, end_row)
        weights, dtype = as_tuned(s.tuned, weights, dtype, row, kernels)
        measure_errors(weights, dtype, s.scheme, part, stats, kernels)
    elif s.goal:
        try:
            part = source.carried(row, end_row, amax)
        except NoRowsError as error:
            return _underived(check, error)
        measure_errors(weights, dtype, s.scheme, part, stats, kernels)
    else:
        arena.reset(reserve(*buffer_shapes(rows, s.columns, s.scheme)))
        buffers = take_buffers(arena, rows, s.columns, s.scheme)
        importance = None if s.importance is None else weights_of(read_vector(s.importance))
        means = read_means(s.importance) if s.importance and s.search and s.search.centered else None
        part, bad = quantize_rows(
            weights, dtype, s.scheme, buffers, stats, kernels, amax, s.dtype, s.search, importance, None, means
        )
        if bad:
            return _unfit(s.name, s.shard)
    arrays: dict[str, NDArray[Any]] = {}
    for spec in (d.spec for d in s.outputs):
        if spec.slab_axis is None:  # no row decides it; compared once
            shape = spec.shape if row == check.cut.row else (0,)
        else:
            shape = spec.slab_shape(row, end_row)
        arrays[spec.suffix] = np.empty(shape, TARGET_ARRAYS[spec.dtype])
    write_values([d.spec for d in s.outputs], arrays)
    layout.pack(part, 0, arrays, s.scheme, kernels)
    if (seen := layout.unpacks_to(s.scheme)) != s.scheme:  # figures are of what is written
        counts = stats[:, COUNTS].copy()
        measure_errors(weights, dtype, seen, layout.unpack(arrays, s.scheme, kernels), stats, kernels)
        stats[:, COUNTS] = counts  # there are no codes any more
    return arrays


def _pair(check: Check, derived: Derived, window: Span, array: NDArray[Any], runs: Runs) -> tuple[Bytes, Bytes, int]:
    """Bytes [lines, bytes] of the result, what they should be, and where the first lies in the file. Of a source that
    is read by columns only those of these columns."""
    s, spec = check.subject, derived.spec
    first, last = lines(derived, s, check.cut)
    held = _held(span(derived, s, check.cut), runs).reshape(last - first, derived.line_bytes)
    made = array.reshape(len(array), -1).view(np.uint8)
    offset = derived.begin + first * derived.line_bytes
    if spec.slab_axis is None:
        return held, made, offset
    begin, end = spec.slab_range(*window)
    if spec.slab_axis == 0:
        left, right = _columns(derived, check) if s.is_strided else (0, derived.line_bytes)
        offset = derived.begin + begin * derived.line_bytes + left
        return held[begin - first : end - first, left:right], made[:, left:right], offset
    left, right = begin * array.itemsize, end * array.itemsize
    return held[:, left:right], made[first:last], offset + left


def _columns(d: Derived, check: Check) -> Span:
    """The bytes of a line that hold nothing but what the columns of a cut became."""
    s, cut, count = check.subject, check.cut, d.spec.shape[-1] if len(d.spec.shape) > 1 else 1
    item_bytes = d.line_bytes // count
    return -(-cut.column * count // s.columns) * item_bytes, cut.end_column * count // s.columns * item_bytes


def _held(wanted: Span, runs: Runs) -> Bytes:
    """The bytes of one tensor among those that were read."""
    begin, end = wanted
    for offset, run in runs:
        if offset <= begin and end <= offset + run.size:
            return run[begin - offset : end - offset]
    raise AssertionError(f"bytes {begin} to {end} were not read")


def _differ(check: Check, derived: Derived, found: Bytes, expected: Bytes, offset: int, line_bytes: int) -> str | None:
    """The first byte that differs; `offset` is that of the first byte, `line_bytes` from one line to the next."""
    if np.array_equal(found, expected):
        return None
    line, byte = (int(i) for i in np.argwhere(found != expected)[0])
    return (
        f"{derived.name} in {check.subject.file} differs at byte {offset + line * line_bytes + byte} of the file: "
        f"expected {expected[line, byte]:#04x}, found {found[line, byte]:#04x}"
    )
