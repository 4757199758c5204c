"""What a report shows of a result: from its records and headers alone."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shardq.errors import CorruptShard, UnknownDtype, VerifyFailed
from shardq.formats import STORAGE
from shardq.ggml import GGML, tensor_bytes
from shardq.headers import read_headers
from shardq.html_report.names import Place, place_of
from shardq.layouts import GGUF_LAYOUT
from shardq.ledger import DECODED, TABLE
from shardq.outputs import Output, open_result, read_output
from shardq.serving.report import describe_serving
from shardq.serving.served import read_served
from shardq.verified import listed_files

Sizes = Mapping[str, int]  # tensor of the output -> bytes
QUANTIZED = "quantized"


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


@dataclass(frozen=True, slots=True)
class Facts:
    """A result."""

    label: str
    source: str
    commit: str | None
    title: str  # of the recipe: scheme and layout
    command: str
    scales: str  # how they were chosen
    fingerprint: str
    version: str
    source_bytes: int
    output_bytes: int
    relative_error: float | None  # over all quantized weights
    rows: tuple[Row, ...]
    serving: tuple[Mapping[str, Any], ...]
    files: Mapping[str, Mapping[str, Any]]  # shard -> sha256 and size

    @property
    def outcomes(self) -> Mapping[str, int]:
        """How many tensors ended how."""
        return Counter(row.outcome for row in self.rows)

    @property
    def weights(self) -> int:
        """Numbers of what the output holds."""
        return sum(r.weights for r in self.rows if r.outcome != "dropped")

    @property
    def bits_per_weight(self) -> float:
        """All tensors of the output over all weights."""
        return 8 * sum(r.output_bytes for r in self.rows) / self.weights if self.weights else 0.0


def read_facts(result: str) -> Facts:
    """Of a finished output, a folder or org/name[@revision]: its records, and the headers of its files.

    Raises VerifyFailed where it is unfinished or no output of shardq, SourceUnreadable, HubAccess, HubTransfer.
    """
    output = read_output(open_result(result), result)
    return make_facts(output, *_headers(output))


def make_facts(output: Output, sizes: Sizes, serving: Sequence[Mapping[str, Any]]) -> Facts:
    """`sizes` of the output's tensors, as its headers have them."""
    identity, provenance = output.identity, output.provenance
    tensors, encoded = output.ledger["tensors"], bool(output.ledger.get("source"))
    members = Counter(name for entry in tensors.values() for name in entry["outputs"])
    rows = tuple(_row(name, entry, sizes, members, encoded) for name, entry in tensors.items())
    errors = provenance.get("errors") or {}
    return Facts(
        label=output.where.rstrip("/").rpartition("/")[2] or output.where,
        source=str(identity["source.label"]),
        commit=identity.get("source.commit"),
        title=f"{identity['recipe.preset']}, {identity['recipe.layout']}",
        command=str(provenance.get("command", "")),
        scales=str((provenance.get("scales") or {}).get("text", "")),
        fingerprint=str(provenance["fingerprint"]),
        version=str(provenance.get("shardq", "")),
        source_bytes=sum(int(shard[1]) for shard in identity["source.shards"]),
        output_bytes=sum(int(record["size"]) for record in provenance["files"].values()),
        relative_error=errors.get("relative") if any(r.relative_error is not None for r in rows) else None,
        rows=rows,
        serving=tuple(serving),
        files=provenance["files"],
    )


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


def _headers(output: Output) -> tuple[Sizes, Sequence[Mapping[str, Any]]]:
    """Bytes of the output's tensors, and what engines do with them; of GGUF files llama.cpp alone reads them."""
    try:
        if output.layout.name == GGUF_LAYOUT:
            return dict(_gguf_sizes(output.ledger.get(TABLE, {}))), ()
        headers = read_headers(output.source, listed_files(output))
    except (CorruptShard, UnknownDtype) as error:
        raise VerifyFailed(str(error)) from error
    tensors = {t.name: t for header in headers.values() for t in header.tensors}
    served = read_served({name: (t.dtype, t.shape) for name, t in tensors.items()}, output.config)
    return {name: t.end - t.begin for name, t in tensors.items()}, describe_serving(served)


def _gguf_sizes(table: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    for name, entry in table.items():
        yield name, tensor_bytes(GGML[entry["type"]], entry["shape"])
