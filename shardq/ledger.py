"""The final account of every source tensor: what became of it, under which names, with which error. Weights that the
source has encoded or stacked stand under names of their own; what they are made of is told apart."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import zstandard

from shardq.block_tasks import BlocksTask
from shardq.decide import Decision
from shardq.figures import Figures, Losses, merge_figures, merge_losses
from shardq.plans import Plan
from shardq.search import describe_search
from shardq.tasks import Done, QuantizeTask
from shardq.weights import kept_shape

if TYPE_CHECKING:
    from shardq.gguf.planned import PlannedTensor

LEDGER: Final = "shardq-ledger.json.zst"
TABLE: Final = "gguf"  # of the ledger of a GGUF output: its tensors, as the headers have them
UNUSUAL: Final = 2.0  # times the median
WORST: Final = 5
DECODED: Final = "decoded"  # kept, and encoded in the source or folded
OUTCOMES: Final = {
    "quantize": "quantized",
    "copy": "copied",
    "drop": "dropped",
}  # action of the plan -> outcome of the ledger, of what is not encoded


@dataclass(frozen=True, slots=True)
class Errors:
    """How far dequantized weights are from their source, over one tensor or many."""

    figures: Figures
    weights: int
    losses: Losses | None = None  # where scales were searched

    @property
    def max_error(self) -> float:
        """Largest |weight - dequantized|."""
        return self.figures.max_error

    @property
    def mse(self) -> float:
        """Mean squared error; 0 for no weights."""
        return self.figures.squared_error / self.weights if self.weights else 0.0

    @property
    def relative(self) -> float:
        """Root of squared error over squared weight; 0 for all-zero weights."""
        f = self.figures
        return math.sqrt(f.squared_error / f.squared_weight) if f.squared_weight else 0.0

    @property
    def sqnr_db(self) -> float | None:
        """Signal to noise in decibels, 10 log10(squared weight / squared error); None where there is no noise, or no
        signal, or one of them is beyond numbers."""
        f = self.figures
        if not f.squared_error or not f.squared_weight or not math.isfinite(f.squared_error + f.squared_weight):
            return None
        return 10 * math.log10(f.squared_weight / f.squared_error)

    @property
    def cosine(self) -> float | None:
        """Of the angle between the weights and what they dequantize to, -1 to 1; None where either are all zero, or
        their sums are beyond numbers.

        From sums over errors e = w - q: w*q = w*w - w*e and q*q = w*w - 2 w*e + e*e, which lose nothing where the error
        is small; of a q that is nearly nothing (below 1e-3 of w) only a few digits are left.
        """
        f = self.figures
        dequantized = f.squared_weight - 2 * f.error_product + f.squared_error
        if not f.squared_weight or not 0 < dequantized < math.inf:
            return None
        product = f.squared_weight - f.error_product
        return max(-1.0, min(1.0, product / math.sqrt(f.squared_weight * dequantized)))

    @property
    def saturated_share(self) -> float:
        """Share of weights whose code is at an end of its range; 0 for no weights."""
        return self.figures.saturated / self.weights if self.weights else 0.0

    @property
    def weighted_relative(self) -> float | None:
        """As `relative`, with errors and weights weighed as the search weighed them; None without a search, and where
        nothing counts."""
        x = self.losses
        return math.sqrt(x.after / x.energy) if x and x.energy else None

    def describe(self) -> dict[str, Any]:
        """The figures that a ledger's entry has, and that anyone with the source can measure again."""
        f = self.figures
        return {
            "squared_error": f.squared_error,
            "squared_weight": f.squared_weight,
            "max_error": f.max_error,
            "relative_error": self.relative,
            "sqnr_db": self.sqnr_db,
            "cosine": self.cosine,
            "saturated_share": self.saturated_share,
            "zeroed_groups": f.zeroed_groups,
        }


SUMMED: Final = frozenset({"squared_error", "squared_weight", "relative_error", "sqnr_db", "cosine"})  # keys of
# `describe` that come of rounded sums
COUNTED: Final = frozenset({"saturated_share", "zeroed_groups"})  # and of codes


def merge(parts: Iterable[Errors]) -> Errors:
    """Errors over several tensors or slabs; sums are exactly rounded, so their order does not matter. Losses only where
    all have them."""
    found = tuple(parts)
    losses = [p.losses for p in found if p.losses]
    return Errors(
        merge_figures(p.figures for p in found),
        sum(p.weights for p in found),
        merge_losses(losses) if losses and len(losses) == len(found) else None,
    )


def tensor_errors(plan: Plan, done: Mapping[int, Done]) -> dict[str, Errors]:
    """Error of each quantized weight, from the reports of its slabs."""
    slabs: dict[str, list[Errors]] = {}
    for task in plan.tasks:
        if isinstance(task, BlocksTask) and any(t.is_quantized for t in task.takes):
            slabs.setdefault(task.tensor, []).append(Errors(done[task.id].figures, task.measured_weights))
        elif isinstance(task, QuantizeTask) and task.scheme:
            d = done[task.id]
            weights = (task.end_row - task.row) * task.columns
            slabs.setdefault(task.tensor, []).append(Errors(d.figures, weights, d.losses))
    return {name: merge(parts) for name, parts in slabs.items()}


def stand_out(plan: Plan, errors: Mapping[str, Errors]) -> tuple[tuple[str, float], ...]:
    """Weights that are hurt more than twice as much as is usual under their scheme, and their relative errors; the
    worst first, at most WORST."""
    by_scheme: dict[str, list[tuple[float, str]]] = {}
    for d in plan.decisions:
        if d.scheme and not d.carried and d.tensor.name in errors:
            by_scheme.setdefault(d.scheme.name, []).append((errors[d.tensor.name].relative, d.tensor.name))
    found: list[tuple[float, str]] = []
    for rows in by_scheme.values():
        limit = UNUSUAL * _median(sorted(x for x, _ in rows))
        found += [row for row in rows if row[0] > limit]
    return tuple((name, relative) for relative, name in sorted(found, key=lambda x: (-x[0], x[1]))[:WORST])


def _median(values: Sequence[float]) -> float:
    """Of at least one value; `values` go up."""
    middle = len(values) // 2
    return values[middle] if len(values) % 2 else (values[middle - 1] + values[middle]) / 2


def damaged(errors: Mapping[str, Errors]) -> tuple[tuple[str, int], ...]:
    """Weights of which groups are left with nothing but zeros, and how many; the most first, at most WORST."""
    found = [(e.figures.zeroed_groups, name) for name, e in errors.items() if e.figures.zeroed_groups]
    return tuple((name, count) for count, name in sorted(found, key=lambda x: (-x[0], x[1]))[:WORST])


def make_ledger(plan: Plan, errors: Mapping[str, Errors]) -> dict[str, Any]:
    """The ledger as plain values; equal for equal plans and outputs."""
    ledger: dict[str, Any] = {
        "format": 1,
        "fingerprint": plan.fingerprint,
        "tensors": {d.tensor.name: _entry(plan, d, errors.get(d.tensor.name)) for d in plan.decisions},
        "source": {
            name: {"outcome": a.fate, "into": a.into, "reason": a.reason} for name, a in plan.weights.absorbed.items()
        },
    }
    if plan.gguf:
        ledger[TABLE] = {t.name: _table_entry(t) for t in plan.gguf.tensors}
    return ledger


def _table_entry(t: "PlannedTensor") -> dict[str, Any]:
    """A tensor of a GGUF file; of those that no weight goes into the config decides the numbers."""
    entry: dict[str, Any] = {"type": t.type, "shape": list(t.shape), "file": t.file}
    return entry if t.weights else entry | {"computed": True}


def _entry(plan: Plan, d: Decision, errors: Errors | None) -> dict[str, Any]:
    t = d.tensor
    entry: dict[str, Any] = {
        "outcome": DECODED if d.action == "copy" and t.encoded else OUTCOMES[d.action],
        "role": d.role.value,
        "rule": d.rule,
        "shard": t.shard,
        "dtype": t.dtype,
        "shape": list(_shape(d)),
        "outputs": list(plan.names_of(d)),
        "file": plan.file_of(d),
    }
    if d.scheme and (place := plan.places.get(t.module)):
        entry["place"] = {"module": place.module, "index": place.index, "count": place.count}
    if d.carried:
        entry["carried"] = True
    if t.name in plan.tuned and plan.recipe.tuned:
        entry["tuned"] = plan.recipe.tuned.algorithm
        if plan.tuned[t.name].is_scaled:
            entry["scaled"] = True  # rows or columns were multiplied first, and errors are of what that made
    if (replaced := plan.replaced.get(t.name)) and plan.recipe.tuned:
        entry |= {"replaced": plan.recipe.tuned.algorithm, "sha256": replaced.sha256}
    if search := plan.searches.searches.get(t.name):
        entry |= {"search": describe_search(search), "weighed": t.name in plan.searches.vectors}
    if errors and (losses := errors.losses):
        entry["losses"] = [losses.before, losses.after]  # under round-to-nearest's scales, and under those chosen
        entry["weighted_relative_error"] = errors.weighted_relative
    if d.scheme and errors:
        entry |= {"scheme": d.scheme.name, **errors.describe()}
    return entry


def _shape(d: Decision) -> tuple[int, ...]:
    if d.tensor.shape is None:
        return ()
    return d.tensor.shape if d.scheme else kept_shape(d.tensor)


def encode_ledger(ledger: Mapping[str, Any]) -> bytes:
    """Compressed JSON; the same bytes for the same ledger and zstandard release."""
    text = json.dumps(ledger, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return zstandard.ZstdCompressor(level=9).compress(text.encode())


def decode_ledger(data: bytes) -> dict[str, Any]:
    """The inverse of encode_ledger."""
    ledger: dict[str, Any] = json.loads(zstandard.ZstdDecompressor().decompress(data))
    return ledger
