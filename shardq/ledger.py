"""The final account of every source tensor: what became of it, under which names, with which error. Weights that the
source has encoded or stacked stand under names of their own; what they are made of is told apart."""

import json
import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import zstandard

from shardq.decide import Decision
from shardq.plans import Plan, output_names
from shardq.searching import describe_search
from shardq.tasks import Done, QuantizeTask
from shardq.weights import kept_shape

LEDGER: Final = "shardq-ledger.json.zst"
UNUSUAL: Final = 2.0  # times the median
WORST: Final = 5
DECODED: Final = "decoded"  # kept, and encoded in the source
OUTCOMES: Final = {
    "quantize": "quantized",
    "copy": "copied",
    "drop": "dropped",
}  # action of the plan -> outcome of the ledger, of what is not encoded


@dataclass(frozen=True, slots=True)
class Errors:
    """How far dequantized weights are from their source, over one tensor or many."""

    squared_error: float  # sum of (weight - dequantized)**2
    squared_weight: float  # sum of weight**2
    max_error: float  # largest |weight - dequantized|
    weights: int

    @property
    def mse(self) -> float:
        """Mean squared error; 0 for no weights."""
        return self.squared_error / self.weights if self.weights else 0.0

    @property
    def relative(self) -> float:
        """Root of squared error over squared weight; 0 for all-zero weights."""
        return math.sqrt(self.squared_error / self.squared_weight) if self.squared_weight else 0.0

    @property
    def sqnr_db(self) -> float | None:
        """Signal to noise in decibels, 10 log10(squared weight / squared error); None where there is no noise, or no
        signal."""
        if not self.squared_error or not self.squared_weight:
            return None
        return 10 * math.log10(self.squared_weight / self.squared_error)


def merge(parts: Iterable[Errors]) -> Errors:
    """Errors over several tensors or slabs; sums are exactly rounded, so their order does not matter."""
    all_parts = tuple(parts)
    return Errors(
        math.fsum(p.squared_error for p in all_parts),
        math.fsum(p.squared_weight for p in all_parts),
        max((p.max_error for p in all_parts), default=0.0),
        sum(p.weights for p in all_parts),
    )


def tensor_errors(plan: Plan, done: Mapping[int, Done]) -> dict[str, Errors]:
    """Error of each quantized weight, from the reports of its slabs."""
    slabs: dict[str, list[Errors]] = {}
    for task in plan.tasks:
        if isinstance(task, QuantizeTask) and task.scheme:
            d = done[task.id]
            weights = (task.end_row - task.row) * task.columns
            slabs.setdefault(task.tensor, []).append(Errors(d.squared_error, d.squared_weight, d.max_error, weights))
    return {name: merge(parts) for name, parts in slabs.items()}


def stand_out(plan: Plan, errors: Mapping[str, Errors]) -> tuple[tuple[str, float], ...]:
    """Weights that are hurt more than twice as much as is usual under their scheme, and their relative errors; the
    worst first, at most WORST."""
    by_scheme: dict[str, list[tuple[float, str]]] = {}
    for d in plan.decisions:
        if d.scheme and not d.carried and d.tensor.name in errors:
            by_scheme.setdefault(d.scheme.name, []).append((errors[d.tensor.name].relative, d.tensor.name))
    found = [
        (relative, name)
        for rows in by_scheme.values()
        for relative, name in rows
        if relative > UNUSUAL * statistics.median(x for x, _ in rows)
    ]
    return tuple((name, relative) for relative, name in sorted(found, key=lambda x: (-x[0], x[1]))[:WORST])


def tensor_losses(plan: Plan, done: Mapping[int, Done]) -> dict[str, tuple[float, float]]:
    """Weighed errors of each weight whose scales were searched: under round-to-nearest's, and under those chosen."""
    slabs: dict[str, list[tuple[float, float]]] = {}
    for task in plan.tasks:
        if isinstance(task, QuantizeTask) and (losses := done[task.id].losses) is not None:
            slabs.setdefault(task.tensor, []).append(losses)
    return {name: (math.fsum(x for x, _ in parts), math.fsum(y for _, y in parts)) for name, parts in slabs.items()}


def make_ledger(plan: Plan, errors: Mapping[str, Errors], losses: Mapping[str, tuple[float, float]]) -> dict[str, Any]:
    """The ledger as plain values; equal for equal plans and outputs."""
    return {
        "format": 1,
        "fingerprint": plan.fingerprint,
        "tensors": {d.tensor.name: _entry(plan, d, errors.get(d.tensor.name), losses) for d in plan.decisions},
        "source": {
            name: {"outcome": a.fate, "into": a.into, "reason": a.reason} for name, a in plan.weights.absorbed.items()
        },
    }


def _entry(plan: Plan, d: Decision, errors: Errors | None, losses: Mapping[str, tuple[float, float]]) -> dict[str, Any]:
    t = d.tensor
    entry: dict[str, Any] = {
        "outcome": DECODED if d.action == "copy" and t.encoded else OUTCOMES[d.action],
        "role": d.role.value,
        "rule": d.rule,
        "shard": t.shard,
        "dtype": t.dtype,
        "shape": list(_shape(d)),
        "outputs": list(output_names(d, plan.layout, plan.places)),
        "file": plan.file_of(d),
    }
    if d.scheme and (place := plan.places.get(t.module)):
        entry["place"] = {"module": place.module, "index": place.index, "count": place.count}
    if d.carried:
        entry["carried"] = True
    if search := plan.searches.searches.get(t.name):
        entry |= {"search": describe_search(search), "weighed": t.name in plan.searches.vectors}
    if t.name in losses:
        entry["losses"] = list(losses[t.name])  # under round-to-nearest's scales, and under those chosen
    if d.scheme and errors:
        entry |= {
            "scheme": d.scheme.name,
            "squared_error": errors.squared_error,
            "squared_weight": errors.squared_weight,
            "max_error": errors.max_error,
            "relative_error": errors.relative,
            "sqnr_db": errors.sqnr_db,
        }
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
