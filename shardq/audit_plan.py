"""What an audit reads of each tensor, and what that costs: pure, from headers alone.

A tensor is read whole where its share of the allowed traffic is enough. Of a larger one a block is compared: rows of
the source, and of the result what these rows became. Where the result keeps a weight's rows together, that is one run
of bytes. Where it keeps columns together (qweight is [columns / 8, rows]), whole lines of the result are read for some
columns, and what is compared is where the rows and the columns meet. A source that keeps columns together (GPTQ, stacks
that are [in, out]) is read like that, too. Of a stack that was only decoded the block is in each slice.

A scale of a whole tensor, or of all that a server runs as one matrix, needs more than the block: the largest magnitude
of all these tensors. They are read for it as far as the traffic goes. Beyond that the scale is taken as the result has
it, and what is compared is all the rest.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any, Final, Literal

from shardq.audit_subjects import DECODED_BYTES, Derived, Subject, draw
from shardq.checkpoint import TensorRef
from shardq.errors import BadOption
from shardq.source_rows import WINDOW_BYTES, encoded_reads, margin_bytes

GAP_BYTES: Final = 1 << 20  # runs of bytes that are no further apart are read at once
COLUMN_LANES: Final = 32  # columns of a block are a multiple: whole words for every width

Span = tuple[int, int]
Origin = Literal["", "derived", "taken"]  # of the scale beyond groups; empty where a scheme has none


@dataclass(frozen=True, slots=True)
class Cut:
    """The part of a tensor that is compared."""

    row: int
    end_row: int
    column: int
    end_column: int


@dataclass(frozen=True, slots=True)
class Check:
    """One tensor's part of an audit."""

    subject: Subject
    cut: Cut
    reads: tuple[Span, ...]  # of the result's file, in order
    scale: Origin = ""
    measured: tuple[TensorRef, ...] = ()  # read whole for their magnitudes, and not for an earlier check already

    @property
    def name(self) -> str:
        """Of the weight."""
        return self.subject.name

    @property
    def outcome(self) -> str:
        """As in the ledger."""
        return self.subject.outcome

    @property
    def role(self) -> str:
        """As in the ledger."""
        return self.subject.role

    @property
    def file(self) -> str:
        """Of the result."""
        return self.subject.file

    @property
    def outputs(self) -> tuple[str, ...]:
        """Tensors of the result."""
        return tuple(d.name for d in self.subject.outputs)

    @property
    def part(self) -> dict[str, Any]:
        """For the statement: rows and columns of what is quantized or decoded, bytes of a copy."""
        s, cut = self.subject, self.cut
        if not s.scheme and not s.encoded:
            return {"bytes": [cut.row, cut.end_row]}
        scheme = {"scheme": s.scheme.name} if s.scheme else {"slices": len(s.encoded)}
        return {**scheme, "rows": [cut.row, cut.end_row], "columns": [cut.column, cut.end_column]}

    @property
    def whole(self) -> bool:
        """True if every byte of the tensor is compared."""
        return self.cut == whole(self.subject)

    @property
    def source_bytes(self) -> int:
        """Bytes that are read from the source."""
        return _read_bytes(self.subject, self.cut) + sum(map(magnitude_bytes, self.measured))

    @property
    def result_bytes(self) -> int:
        """Bytes that are read from the result."""
        return sum(end - begin for begin, end in self.reads)

    @property
    def windows(self) -> tuple[Span, ...]:
        """Rows that are read from the source at once."""
        return row_windows(self.cut.row, self.cut.end_row, self.subject.row_bytes, self.subject.unit_rows)

    @property
    def requests(self) -> int:
        """Reads on both sides, none larger than a window."""
        s = self.subject
        own = sum(1 for _ in _encoded_reads(s, self.cut)) if s.encoded else len(self.windows)
        return own + sum(map(_magnitude_requests, self.measured)) + sum(len(split(x)) for x in self.reads)


def row_windows(row: int, end_row: int, row_bytes: int, unit_rows: int) -> tuple[Span, ...]:
    """Rows in windows, each but the last a multiple of `unit_rows`."""
    step = max(unit_rows, WINDOW_BYTES // max(1, row_bytes) // unit_rows * unit_rows)
    return tuple((at, min(end_row, at + step)) for at in range(row, end_row, step))


def magnitude_windows(t: TensorRef) -> tuple[Span, ...]:
    """Rows of a matrix that are read at once for its largest magnitude."""
    assert t.shape is not None
    rows, columns = t.shape
    return row_windows(0, rows, DECODED_BYTES * columns if t.encoded else t.size_bytes // rows, 1)


def magnitude_bytes(t: TensorRef) -> int:
    """What it costs to read a matrix for its largest magnitude."""
    return sum(end - begin for begin, end in _magnitude_reads(t)) if t.encoded else t.size_bytes


def whole(s: Subject) -> Cut:
    """All of a tensor."""
    return Cut(0, s.rows, 0, s.columns)


def lines(d: Derived, s: Subject, cut: Cut) -> Span:
    """Indices of the first axis of a result's tensor that hold what `cut` asks for."""
    if d.spec.slab_axis is None or s.rows == 0:
        return 0, d.spec.shape[0]
    if d.spec.slab_axis == 0:
        return d.spec.slab_range(cut.row, cut.end_row)
    count = d.spec.shape[0]
    return cut.column * count // s.columns, -(-cut.end_column * count // s.columns)


def span(d: Derived, s: Subject, cut: Cut) -> Span:
    """Where these lines lie in the result's file."""
    first, last = lines(d, s, cut)
    return d.begin + first * d.line_bytes, d.begin + last * d.line_bytes


def split(wanted: Span) -> tuple[Span, ...]:
    """A run of bytes in windows."""
    begin, end = wanted
    return tuple((at, min(end, at + WINDOW_BYTES)) for at in range(begin, end, WINDOW_BYTES))


def plan_checks(subjects: Sequence[Subject], budget_bytes: int | None, seed: int) -> tuple[Check, ...]:
    """What to read of each tensor, in order, so that all of it costs no more than `budget_bytes`; None: all of each.

    Small tensors are read whole, and what they leave of their shares goes to larger ones. A scale beyond groups is
    derived where a share has room for the tensors that it takes, or where something is left at the end. Raises
    BadOption when the budget is too small for the least block of each.
    """
    everything = {t.name: magnitude_bytes(t) for s in subjects for t in s.reach}
    needed = sum(_cost(s, whole(s)) for s in subjects) + sum(everything.values())
    if budget_bytes is None or needed <= budget_bytes:
        spare_bytes = None if budget_bytes is None else budget_bytes - needed
        return _checks(subjects, {s.name: whole(s) for s in subjects}, set(everything), spare_bytes)
    least = {s.name: _least_bytes(s) for s in subjects}
    untold = {t.name: magnitude_bytes(t) for s in subjects if not s.stores_scale for t in s.reach}  # no scale to take
    measured = set(untold)
    reserved, left = sum(least.values()), budget_bytes - sum(untold.values())
    if reserved > left:
        raise BadOption(
            f"--max-traffic leaves {budget_bytes} bytes for {len(subjects)} tensors, which need at least "
            f"{reserved + budget_bytes - left}: allow more, or take a smaller --sample"
        )
    cuts: dict[str, Cut] = {}
    order = sorted(subjects, key=lambda s: _cost(s, whole(s)) + _unmeasured_bytes(s, set()))
    for done, s in enumerate(order):
        reserved -= least[s.name]
        share = min(max(least[s.name], left // (len(subjects) - done)), left - reserved)
        more_bytes = _unmeasured_bytes(s, measured)
        if more_bytes + least[s.name] > share:
            more_bytes = 0
        else:
            measured.update(t.name for t in s.reach)
        cuts[s.name] = _cut(s, share - more_bytes, seed)
        left -= _cost(s, cuts[s.name]) + more_bytes
    for s in order:
        more_bytes = _unmeasured_bytes(s, measured)
        if more_bytes <= left:
            measured.update(t.name for t in s.reach)
            left -= more_bytes
    return _checks(subjects, cuts, measured, left)


def _unmeasured_bytes(s: Subject, measured: Set[str]) -> int:
    """What it costs to measure the rest of what a tensor's scale needs."""
    return sum(magnitude_bytes(t) for t in s.reach if t.name not in measured)


def _checks(
    subjects: Sequence[Subject], cuts: Mapping[str, Cut], measured: Set[str], spare_bytes: int | None
) -> tuple[Check, ...]:
    """One for each subject. Of what lies between the tensors of a module, no more is read than of the module itself,
    and no more than `spare_bytes` in all."""
    checks: list[Check] = []
    paid: set[str] = set()
    for s in subjects:
        cut = cuts[s.name]
        apart = sorted(x for x in (span(d, s, cut) for d in s.outputs) if x[0] < x[1])
        wanted = sum(end - begin for begin, end in apart)
        gap_bytes = min(GAP_BYTES, wanted // len(s.outputs)) if s.scheme else -1  # slices of a stack one by one
        reads = _join(apart, gap_bytes if spare_bytes is None else min(gap_bytes, spare_bytes // len(s.outputs)))
        derived = all(t.name in measured for t in s.reach)
        own = tuple(t for t in s.reach if derived and t.name not in paid)
        paid.update(t.name for t in own)
        checks.append(Check(s, cut, reads, ("derived" if derived else "taken") if s.reach else "", own))
        if spare_bytes is not None:
            spare_bytes -= checks[-1].result_bytes - wanted
    return tuple(checks)


def _cut(s: Subject, allowed_bytes: int, seed: int) -> Cut:
    """The whole tensor or a block of it at a place that the seed decides, for at most `allowed_bytes`."""
    if _cost(s, whole(s)) <= allowed_bytes:
        return whole(s)
    step = _column_step(s)
    source_bytes = _read_bytes(s, whole(s))
    by_column = sum(d.size_bytes for d in s.outputs if d.spec.slab_axis == 1) + source_bytes * s.is_strided
    by_row = sum(d.size_bytes for d in s.outputs if d.spec.slab_axis == 0) + source_bytes * (not s.is_strided)
    fixed = sum(d.size_bytes for d in s.outputs if d.spec.slab_axis is None)
    least_rows = -(-by_row * min(s.rows, s.unit_rows) // s.rows) + _margin_bytes(s)
    # Half for the rows of the source, half for lines of the result; what one side cannot use goes to the other.
    for_lines = allowed_bytes - fixed - max(least_rows, min((allowed_bytes - fixed) // 2, by_row))
    count = s.columns
    if by_column > max(0, for_lines):
        count = max(step, s.columns * for_lines // by_column // step * step)
    column, end_column = _columns(seed, s, count)
    while count > step and _cost(s, Cut(0, 0, column, end_column)) + least_rows > allowed_bytes:
        count -= step  # lines are whole, and few of them may hold many columns
        column, end_column = _columns(seed, s, count)
    lines_bytes = _cost(s, Cut(0, 0, column, end_column))
    rows = (allowed_bytes - lines_bytes) * s.rows // max(1, by_row)
    while True:
        rows = max(s.unit_rows, min(rows, s.rows) // s.unit_rows * s.unit_rows)
        row = _place(seed, "row", s, rows, s.rows, s.unit_rows)
        cut = Cut(row, min(s.rows, row + rows), column, end_column)
        over_bytes = _cost(s, cut) - allowed_bytes
        if over_bytes <= 0 or rows == s.unit_rows:
            return cut
        rows -= max(s.unit_rows, over_bytes * s.rows // max(1, by_row))  # windows of codes cost more than their share


def _columns(seed: int, s: Subject, count: int) -> Span:
    """A run of `count` columns, or fewer at the end."""
    column = _place(seed, "column", s, count, s.columns, _column_step(s))
    return column, min(s.columns, column + count)


def _place(seed: int, what: str, s: Subject, count: int, total: int, step: int) -> int:
    """Where a run of `count` of `total` begins, a multiple of `step`; the last may end behind the total."""
    return draw(seed, what, s.name) % (-(-max(0, total - count) // step) + 1) * step


def _column_step(s: Subject) -> int:
    """Columns of the smallest block: whole groups and whole words, where the row has more than one group."""
    if s.scheme is None:
        return min(s.columns, COLUMN_LANES if s.is_strided else 1)
    group = s.scheme.group_columns(s.columns)
    if group == s.columns:  # rows are whole, and so all groups, unless the source is read by columns
        return s.columns if s.is_strided and s.scheme.reach != "tensor" else min(s.columns, COLUMN_LANES)
    return min(s.columns, math.lcm(group, COLUMN_LANES))


def _least_bytes(s: Subject) -> int:
    """What the smallest block may cost, at the worst place."""
    margin = sum(d.line_bytes for d in s.outputs if d.spec.slab_axis == 1) + _margin_bytes(s)
    smallest = Cut(0, min(s.rows, s.unit_rows), 0, _column_step(s))
    return min(_cost(s, whole(s)), _cost(s, smallest) + margin)


def _cost(s: Subject, cut: Cut) -> int:
    """Bytes that a cut reads from both sides."""
    spans = (span(d, s, cut) for d in s.outputs)
    return _read_bytes(s, cut) + sum(end - begin for begin, end in spans)


def _read_bytes(s: Subject, cut: Cut) -> int:
    """Bytes that a cut reads from the source."""
    if s.encoded:
        return sum(end - begin for begin, end in _encoded_reads(s, cut))
    return (cut.end_row - cut.row) * s.row_bytes


def _encoded_reads(s: Subject, cut: Cut) -> Iterator[Span]:
    windows = row_windows(cut.row, cut.end_row, s.row_bytes, s.unit_rows)
    for e in s.encoded:
        yield from encoded_reads(e, (cut.column, cut.end_column), windows)


def _magnitude_reads(t: TensorRef) -> Iterator[Span]:
    (e,) = t.encoded
    return encoded_reads(e, (0, e.columns), magnitude_windows(t))


def _magnitude_requests(t: TensorRef) -> int:
    return sum(1 for _ in _magnitude_reads(t)) if t.encoded else len(magnitude_windows(t))


def _margin_bytes(s: Subject) -> int:
    """How much more a block of an encoded weight may cost than its share, and at one place than at another."""
    return sum(map(margin_bytes, s.encoded))


def _join(spans: Iterable[Span], gap_bytes: int) -> tuple[Span, ...]:
    """Spans in order, those joined that are at most `gap_bytes` apart."""
    joined: list[Span] = []
    for begin, end in spans:
        if joined and begin - joined[-1][1] <= gap_bytes:
            joined[-1] = (joined[-1][0], end)
        else:
            joined.append((begin, end))
    return tuple(joined)
