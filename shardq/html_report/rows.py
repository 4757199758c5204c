"""Tensors of a result, as its ledger has them, and sums over them."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shardq.formats import STORAGE
from shardq.html_report.names import Place, place_of
from shardq.ledger import DECODED

Sizes = Mapping[str, int]  # tensor of the output -> bytes


@dataclass(frozen=True, slots=True)
class Row:
    """One tensor of the source."""

    name: str
    place: Place
    role: str
    outcome: str
    rule: str  # what decided its role, or why it is not quantized
    scheme: str  # empty for what is kept
    dtype: str
    shape: tuple[int, ...]
    source_bytes: int | None  # None where the source had it in codes
    output_bytes: float  # its share of a stack's, where it is in one
    relative_error: float | None  # root of squared error over squared weight; None without codes of our own
    squared_error: float
    squared_weight: float
    cosine: float | None
    saturated_share: float | None
    zeroed_groups: int

    @property
    def weights(self) -> int:
        """Numbers in it."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class RoleTotal:
    """All tensors of one role and one scheme."""

    role: str
    scheme: str
    tensors: int
    weights: int
    output_bytes: float

    @property
    def bits_per_weight(self) -> float:
        """Of what the output holds; 0 for no weights."""
        return 8 * self.output_bytes / self.weights if self.weights else 0.0


def read_rows(ledger: Mapping[str, Any], sizes: Sizes) -> tuple[Row, ...]:
    """One for each of a ledger's tensors, in its order."""
    tensors, encoded = ledger["tensors"], bool(ledger.get("source"))
    members = Counter(name for entry in tensors.values() for name in entry["outputs"])
    return tuple(_row(name, entry, sizes, members, encoded) for name, entry in tensors.items())


def total_roles(rows: Sequence[Row]) -> list[RoleTotal]:
    """By role and scheme, those with the most bytes first."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row.outcome != "dropped":
            found.setdefault((row.role, row.scheme), []).append(row)
    totals = [
        RoleTotal(role, scheme, len(of), sum(r.weights for r in of), sum(r.output_bytes for r in of))
        for (role, scheme), of in found.items()
    ]
    return sorted(totals, key=lambda t: (-t.output_bytes, t.role, t.scheme))


def relative_error(rows: Sequence[Row]) -> float | None:
    """Root of the sum of squared errors over that of squared weights; None where nothing was measured."""
    own = [r for r in rows if r.relative_error is not None]
    energy = math.fsum(r.squared_weight for r in own)
    if not own:
        return None
    return math.sqrt(math.fsum(r.squared_error for r in own) / energy) if energy else 0.0


def _row(name: str, entry: Mapping[str, Any], sizes: Sizes, members: Mapping[str, int], encoded: bool) -> Row:
    shape, dtype = tuple(entry["shape"]), entry["dtype"] or ""
    plain = not encoded and entry["outcome"] != DECODED and dtype in STORAGE
    relative = entry.get("relative_error")
    return Row(
        name=name,
        place=place_of(name),
        role=entry["role"],
        outcome=entry["outcome"],
        rule=entry["rule"],
        scheme=entry.get("scheme", ""),
        dtype=dtype,
        shape=shape,
        source_bytes=math.prod(shape) * STORAGE[dtype].bits // 8 if plain else None,
        output_bytes=sum(sizes.get(out, 0) / members[out] for out in entry["outputs"]),
        relative_error=None if entry.get("carried") else relative,
        squared_error=entry.get("squared_error", 0.0),
        squared_weight=entry.get("squared_weight", 0.0),
        cosine=entry.get("cosine"),
        saturated_share=entry.get("saturated_share"),
        zeroed_groups=entry.get("zeroed_groups", 0),
    )
