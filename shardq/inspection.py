"""What is in a repo or folder: roles, schemes, layouts, bits per weight. Headers only."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

from shardq.checkpoint import Checkpoint, TensorRef
from shardq.companions import find_companions
from shardq.headers import read_checkpoint
from shardq.layouts import LAYOUTS
from shardq.layouts.base import Layout
from shardq.roles import Verdict, assign_roles
from shardq.schemes import Scheme
from shardq.sources.base import Source


@dataclass(frozen=True, slots=True)
class RoleCount:
    """All tensors of one role."""

    role: str
    tensors: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Inspection:
    """A checkpoint in figures."""

    label: str
    commit: str | None
    shards: int
    tensors: int
    size_bytes: int
    parameters: int  # logical: packed weights count as what they stand for
    bits_per_weight: float  # all bytes over all parameters
    layout: str | None  # a known layout's name; None when not quantized, or foreign
    schemes: dict[str, int]  # scheme -> modules, of a known layout
    source_kinds: dict[str, int]  # companions of a foreign quantized checkpoint, by kind
    roles: tuple[RoleCount, ...]
    verdicts: dict[str, Verdict]  # tensor -> role and deciding rule
    warnings: tuple[str, ...]


def inspect_source(source: Source) -> Inspection:
    """Describe what a source holds. Raises SourceUnreadable, CorruptShard and the like."""
    c = read_checkpoint(source)
    block = (c.config or {}).get("quantization_config") or {}
    layout = _known_layout(block)
    schemes = _schemes(c, layout, block) if layout else {}
    foreign = {} if layout else Counter(x.kind for x in find_companions(c.tensors.values()))
    verdicts = assign_roles(c.tensors.values(), c.config)
    sizes = sum(t.size_bytes for t in c.tensors.values())
    parameters = sum(_parameters(t, schemes) for t in c.tensors.values())
    return Inspection(
        label=c.label,
        commit=c.commit,
        shards=len(c.shards),
        tensors=len(c.tensors),
        size_bytes=sizes,
        parameters=parameters,
        bits_per_weight=8 * sizes / parameters if parameters else 0.0,
        layout=layout.name if layout else None,
        schemes=dict(Counter(s.name for s in schemes.values())),
        source_kinds=dict(foreign),
        roles=_census(c, verdicts, schemes),
        verdicts=verdicts,
        warnings=c.warnings,
    )


def _known_layout(block: dict[str, Any]) -> Layout | None:
    method = str(block.get("quant_method", ""))
    return next((x for x in LAYOUTS if method and (method == x.name or method in x.aliases)), None)


def _schemes(c: Checkpoint, layout: Layout, block: dict[str, Any]) -> dict[str, Scheme]:
    """Scheme of each packed module, as a loader would believe it."""
    packed = [t.module for t in c.tensors.values() if t.name.endswith(".qweight")]
    found = {m: layout.scheme_of(block, m) for m in packed}
    return {m: s for m, s in found.items() if s}


def _parameters(t: TensorRef, schemes: dict[str, Scheme]) -> int:
    """Weights that a tensor stands for: 0 for scales, zero points and group indices."""
    scheme = schemes.get(t.module)
    if scheme is None:
        return t.numel
    return t.numel * 32 // scheme.bits if t.name.endswith(".qweight") else t.numel if t.name.endswith(".bias") else 0


def _census(c: Checkpoint, verdicts: dict[str, Verdict], schemes: dict[str, Scheme]) -> tuple[RoleCount, ...]:
    tensors: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for t in c.tensors.values():
        role = "quantized" if t.module in schemes and not t.name.endswith(".bias") else verdicts[t.name].role.value
        tensors[role] += 1
        sizes[role] += t.size_bytes
    return tuple(RoleCount(r, n, sizes[r]) for r, n in sorted(tensors.items()))
