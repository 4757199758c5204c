"""What an audit found, and the statement of it that others can check."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Protocol

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


class Checked(Protocol):
    """What is compared of one tensor: an audit_plan.Check, or a gguf_audit.GgufCheck."""

    @property
    def name(self) -> str:
        """Of the weight."""

    @property
    def outcome(self) -> str:
        """As in the ledger."""

    @property
    def role(self) -> str:
        """As in the ledger."""

    @property
    def file(self) -> str:
        """Of the result."""

    @property
    def outputs(self) -> tuple[str, ...]:
        """Tensors of the result."""

    @property
    def whole(self) -> bool:
        """True if every byte of the tensor is compared."""

    @property
    def scale(self) -> str:
        """Where a scale beyond groups comes from; empty where there is none."""

    @property
    def source_bytes(self) -> int:
        """Bytes that are read from the source."""

    @property
    def result_bytes(self) -> int:
        """Bytes that are read from the result."""

    @property
    def requests(self) -> int:
        """Reads on both sides."""

    @property
    def part(self) -> dict[str, Any]:
        """What of the tensor is compared, for the statement."""


@dataclass(frozen=True, slots=True)
class Audited:
    """One tensor of an audit."""

    check: Checked
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
    c = tensor.check
    return {
        "name": c.name,
        "outcome": c.outcome,
        "role": c.role,
        "file": c.file,
        "outputs": list(c.outputs),
        "whole": c.whole,
        **c.part,
        **({"scale": c.scale} if c.scale else {}),
        "source_bytes": c.source_bytes,
        "result_bytes": c.result_bytes,
        "bytes_compared": tensor.bytes_compared,
        "equal": None if dry_run else tensor.problem is None,
    }
