"""An audit of a GGUF output: the plan is made again, and of chosen weights all or some rows are derived.

A weight is derived whole where its share of the allowed traffic is enough, else a block of its rows at a place that the
seed decides. Of codes that lie in columns any rows need all of them.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final

from shardq.audit_statement import Audited
from shardq.audit_subjects import draw
from shardq.errors import BadOption
from shardq.gguf_remade import check_plan, check_sizes, remake_plan
from shardq.gguf_rows import DerivedRows, Difference, Made, Span, by_name, compare_extent, compare_fixed, find_made
from shardq.importance import Importance
from shardq.kernels import KernelSet, load
from shardq.ledger import merge
from shardq.outputs import Output
from shardq.source_rows import WINDOW_BYTES, NoRowsError
from shardq.sources.base import Source
from shardq.unpack import check_errors

READERS: Final = 4  # weights that are derived side by side


@dataclass(frozen=True, slots=True)
class GgufCheck:
    """One weight's part of an audit."""

    made: Made
    entry: Mapping[str, Any]  # of the ledger
    span: Span  # rows that are derived

    @property
    def name(self) -> str:
        """Of the weight."""
        return self.made.tensor.name

    @property
    def outcome(self) -> str:
        """As in the ledger."""
        return str(self.entry["outcome"])

    @property
    def role(self) -> str:
        """As in the ledger."""
        return str(self.entry["role"])

    @property
    def file(self) -> str:
        """As in the ledger: that of its first tensor."""
        return str(self.entry["file"])

    @property
    def outputs(self) -> tuple[str, ...]:
        """The tensors of the result that these rows are in."""
        return tuple(dict.fromkeys(t.tensor for t in self._takes))

    @property
    def whole(self) -> bool:
        """True if all of the weight is derived."""
        return self.span == (0, self.made.rows)

    @property
    def scale(self) -> str:
        """Blocks have scales of their own."""
        return ""

    @property
    def source_bytes(self) -> int:
        """Bytes that are read from the source."""
        return sum(end - begin for begin, end in self.made.source_reads(*self.span))

    @property
    def result_bytes(self) -> int:
        """Bytes that are read from the result."""
        return sum(self.made.output_bytes(*self.span))

    @property
    def requests(self) -> int:
        """Reads on both sides."""
        own = sum(1 for _ in self.made.source_reads(*self.span))
        return own + sum(-(-size // WINDOW_BYTES) for size in self.made.output_bytes(*self.span))

    @property
    def part(self) -> dict[str, Any]:
        """For the statement: in which types these rows are, and which they are; a vector is one row."""
        return {"types": sorted({t.type for t in self._takes}), "rows": list(self.span)}

    @property
    def cost_bytes(self) -> int:
        """Bytes that are read from both sides."""
        return self.source_bytes + self.result_bytes

    @property
    def _takes(self) -> tuple[Any, ...]:
        return self.made.part(*self.span).takes if self.made.rows > 1 else self.made.takes


class GgufSide:
    """The chosen weights of a GGUF output."""

    def __init__(
        self, names: Sequence[str], output: Output, result: Source, source: Source, importance: Importance | None
    ) -> None:
        """Reads all headers and small files of the source, and the headers of the result, which are compared. Raises as
        remake_plan."""
        self._output, self._result, self._source = output, result, source
        self._plan = remake_plan(output, source, importance)
        self._files = by_name(self._plan)
        odd = list(check_sizes(output, self._files))
        self.problems = [*check_plan(output, self._plan), *odd]
        if not odd:
            self.problems += (p for f in self._files.values() if (p := compare_fixed(result, f).problem))
        made, entries = find_made(self._plan), output.ledger["tensors"]
        chosen = () if odd else (n for n in names if n in made)  # places are those of files of these sizes
        self._whole = [GgufCheck(made[n], entries[n], (0, made[n].rows)) for n in chosen]

    def audit(self, budget_bytes: int | None, seed: int, dry_run: bool) -> list[Audited]:
        """As of auditing.TensorSide; blocks of rows where the budget has no room for all."""
        checks = self._plan_checks(budget_bytes, seed)
        return [Audited(c, 0, None) for c in checks] if dry_run else self._compare_all(checks)

    def _plan_checks(self, budget_bytes: int | None, seed: int) -> tuple[GgufCheck, ...]:
        if budget_bytes is None or sum(c.cost_bytes for c in self._whole) <= budget_bytes:
            return tuple(self._whole)
        least = {c.name: _block(c, 1, seed).cost_bytes for c in self._whole}
        reserved, left = sum(least.values()), budget_bytes
        if reserved > left:
            raise BadOption(
                f"--max-traffic leaves {budget_bytes} bytes for {len(least)} tensors, which need at least {reserved}: "
                "allow more, or take a smaller --sample"
            )
        checks: dict[str, GgufCheck] = {}
        order = sorted(self._whole, key=lambda c: c.cost_bytes)
        for done, c in enumerate(order):
            reserved -= least[c.name]
            share = min(max(least[c.name], left // (len(order) - done)), left - reserved)
            checks[c.name] = _largest(c, share, seed)
            left -= checks[c.name].cost_bytes
        return tuple(checks[c.name] for c in self._whole)

    def _compare_all(self, checks: Sequence[GgufCheck]) -> list[Audited]:
        kernels = load()
        with ThreadPoolExecutor(READERS) as pool:
            futures = [pool.submit(self._audit, c, kernels) for c in checks]
            try:
                return [f.result() for f in futures]
            finally:
                pool.shutdown(wait=True, cancel_futures=True)

    def _audit(self, check: GgufCheck, kernels: KernelSet) -> Audited:
        try:
            found = self._compare(check, kernels)
        except NoRowsError as e:
            found = Difference(0, f"{check.name} cannot be derived: {e}")
        return Audited(check, found.bytes_compared, found.problem)

    def _compare(self, check: GgufCheck, kernels: KernelSet) -> Difference:
        rows = DerivedRows(check.made, self._output.rounded, self._source, kernels)
        compared, errors = 0, []
        for slab in check.made.slabs(*check.span):
            extents, measured = rows.derive(*slab)
            for file, (data, offset) in extents:
                found = compare_extent(self._result, self._files[file], data, offset)
                compared += found.bytes_compared
                if found.problem:
                    return Difference(compared, found.problem)
            errors.append(measured)
        is_measured = check.whole and check.outcome == "quantized"
        problem = next(check_errors(check.name, check.entry, merge(errors)), None) if is_measured else None
        return Difference(compared, problem)


def _block(check: GgufCheck, rows: int, seed: int) -> GgufCheck:
    """So many rows, and what must stay with them, at a place that the seed decides; more rows have all of fewer."""
    total = check.made.rows
    first = min(draw(seed, "row", check.name) % total, total - rows)
    return GgufCheck(check.made, check.entry, check.made.snap(first, first + rows))


def _largest(check: GgufCheck, allowed_bytes: int, seed: int) -> GgufCheck:
    """The largest block that costs at most `allowed_bytes`, or the smallest."""
    if check.cost_bytes <= allowed_bytes:
        return check
    fits, too_many = 1, check.made.rows
    while too_many - fits > 1:
        middle = (fits + too_many) // 2
        if _block(check, middle, seed).cost_bytes <= allowed_bytes:
            fits = middle
        else:
            too_many = middle
    return _block(check, fits, seed)
