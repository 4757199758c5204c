"""What a report shows of a result: from its records and headers alone."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shardq.errors import CorruptShard, UnknownDtype, VerifyFailed
from shardq.ggml import GGML, tensor_bytes
from shardq.headers import read_headers
from shardq.html_report.rows import Row, Sizes, read_rows
from shardq.layouts import GGUF_LAYOUT
from shardq.ledger import TABLE
from shardq.outputs import Output, open_result, read_output
from shardq.serving.report import describe_serving
from shardq.serving.served import read_served
from shardq.verified import listed_files


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
    rows = read_rows(output.ledger, sizes)
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
