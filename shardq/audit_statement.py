"""What an audit found, and the statement of it that others can check."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from shardq.audit_plan import Check
from shardq.version import NUMERICS, VERSION

FORMAT: Final = 1


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes that are read, and in how many reads."""

    header_bytes: int  # records and headers of both sides
    source_bytes: int
    result_bytes: int
    requests: int

    @property
    def total_bytes(self) -> int:
        """All of them."""
        return self.header_bytes + self.source_bytes + self.result_bytes


@dataclass(frozen=True, slots=True)
class Audited:
    """One tensor of an audit."""

    check: Check
    bytes_compared: int  # of the result; 0 in a dry run
    problem: str | None  # what is not equal


@dataclass(frozen=True, slots=True)
class Audit:
    """What an audit found, or with `dry_run` would read."""

    result: str  # folder or repo, as it was named
    result_label: str  # publishable: the repo's or the folder's own name
    result_commit: str | None
    source: str  # publishable
    source_commit: str | None
    identity: Mapping[str, Any]  # what the records say that the result was made of
    fingerprint: str
    seed: int
    sample: int  # asked for
    max_traffic_bytes: int | None
    tensors: tuple[Audited, ...]
    tensors_in_ledger: int
    traffic: Traffic
    problems: tuple[str, ...]  # empty when all that was compared is equal
    dry_run: bool


def make_statement(audit: Audit) -> dict[str, Any]:
    """The audit as plain values, with a digest: the sha256 of the canonical JSON (sorted keys, no spaces, ASCII) of
    everything else. Equal audits of equal files make equal statements: it holds no time and no path."""
    statement: dict[str, Any] = {
        "format": FORMAT,
        "tool": f"shardq {VERSION}",
        "numerics": NUMERICS,
        "result": {"label": audit.result_label, "commit": audit.result_commit},
        "source": {"label": audit.source, "commit": audit.source_commit},
        "made_from": {k.removeprefix("source."): audit.identity[k] for k in ("source.label", "source.commit")},
        "made_with": audit.identity.get("version"),
        "recipe": {k.removeprefix("recipe."): v for k, v in audit.identity.items() if k.startswith("recipe.")},
        "fingerprint": audit.fingerprint,
        "seed": audit.seed,
        "sample": audit.sample,
        "max_traffic_bytes": audit.max_traffic_bytes,
        "tensors_in_ledger": audit.tensors_in_ledger,
        "tensors": [_describe(t, audit.dry_run) for t in audit.tensors],
        "traffic": {
            "header_bytes": audit.traffic.header_bytes,
            "source_bytes": audit.traffic.source_bytes,
            "result_bytes": audit.traffic.result_bytes,
            "total_bytes": audit.traffic.total_bytes,
            "requests": audit.traffic.requests,
        },
        "problems": list(audit.problems),
        "verdict": "different" if audit.problems else "planned" if audit.dry_run else "equal",
    }
    return {**statement, "digest": digest(statement)}


def digest(statement: Mapping[str, Any]) -> str:
    """What the digest of a statement must be."""
    rest = {k: v for k, v in statement.items() if k != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _describe(tensor: Audited, dry_run: bool) -> dict[str, Any]:
    s, cut = tensor.check.subject, tensor.check.cut
    part: dict[str, Any] = {"bytes": [cut.row, cut.end_row]}
    if s.scheme or s.encoded:
        scheme = {"scheme": s.scheme.name} if s.scheme else {"slices": len(s.encoded)}
        part = {**scheme, "rows": [cut.row, cut.end_row], "columns": [cut.column, cut.end_column]}
    return {
        "name": s.name,
        "outcome": s.outcome,
        "role": s.role,
        "file": s.file,
        "outputs": [d.name for d in s.outputs],
        "whole": tensor.check.whole,
        **part,
        **({"scale": tensor.check.scale} if tensor.check.scale else {}),
        "source_bytes": tensor.check.source_bytes,
        "result_bytes": tensor.check.result_bytes,
        "bytes_compared": tensor.bytes_compared,
        "equal": None if dry_run else tensor.problem is None,
    }
