"""What is in a repo or folder: roles, schemes, layouts, bits per weight. Headers only."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass
from typing import Any

from shardq.checkpoint import Checkpoint
from shardq.companions import find_companions
from shardq.errors import ShardqError, UnsupportedSource
from shardq.headers import read_checkpoint
from shardq.layouts import LAYOUTS, find_layout
from shardq.layouts.base import Layout
from shardq.layouts.fake import Fake
from shardq.recipe import dequantize_recipe
from shardq.roles import Verdict, assign_roles
from shardq.schemes import Scheme
from shardq.serving.served import WHOLE_ROW, WHOLE_TENSOR, Served, Stored, read_served, tensors_of
from shardq.sources.base import Source
from shardq.weights import Weights, find_weights


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
    parameters: int  # logical: packed weights count as what they stand for; codes that nothing here reads as numbers
    bits_per_weight: float  # all bytes over all parameters
    layout: str | None  # a known layout's name; None when not quantized, or in none of them
    schemes: dict[str, int]  # scheme -> modules, a stack of them being one; described, where no scheme has that name
    source_kinds: dict[str, int]  # what a quantized checkpoint in no known layout is made of, by kind
    weights: dict[str, int]  # role -> weights that a quantized checkpoint stands for; empty if no reader knows it
    roles: tuple[RoleCount, ...]
    verdicts: dict[str, Verdict]  # tensor -> role and deciding rule
    warnings: tuple[str, ...]


def inspect_source(source: Source) -> Inspection:
    """Describe what a source holds. Raises SourceUnreadable, CorruptShard and the like."""
    c = read_checkpoint(source)
    served = read_served(tensors_of(c.tensors.values()), c.config or {})
    layout, block = _find_layout(served)
    companions = find_companions(c.tensors.values())
    verdicts = assign_roles(c.tensors.values(), c.config)
    sizes = sum(t.size_bytes for t in c.tensors.values())
    logical, problems = _read_weights(c)
    sizes_of = {m.tensor: m.weights for m in served.quantized} | _decoded_sizes(logical)
    beside = {x.name for x in companions if x.part == "parameter"}
    parameters = sum(sizes_of.get(n, 0 if n in beside else t.numel) for n, t in c.tensors.items())
    return Inspection(
        label=c.label,
        commit=c.commit,
        shards=len(c.shards),
        tensors=len(c.tensors),
        size_bytes=sizes,
        parameters=parameters,
        bits_per_weight=8 * sizes / parameters if parameters else 0.0,
        layout=layout.name if layout else None,
        schemes=dict(Counter(_schemes(served, layout, block))),
        source_kinds={} if layout else dict(Counter(x.kind for x in companions)),
        weights=_count_roles(c, logical),
        roles=_census(c, verdicts, beside | sizes_of.keys()),
        verdicts=verdicts,
        warnings=(*c.warnings, *problems),
    )


def _read_weights(c: Checkpoint) -> tuple[Weights | None, tuple[str, ...]]:
    """What it stands for, with stacks as they are; None, and why, for codes that no reader knows."""
    try:
        return find_weights(c, dequantize_recipe()), ()
    except UnsupportedSource as problem:
        return None, (f"Its weights cannot be read: {problem}.",)


def _decoded_sizes(weights: Weights | None) -> dict[str, int]:
    """Numbers that each tensor of codes stands for."""
    tensors = weights.tensors.values() if weights else ()
    return {t.encoded[0].parts[0].tensor: sum(e.rows * e.columns for e in t.encoded) for t in tensors if t.encoded}


def _count_roles(c: Checkpoint, weights: Weights | None) -> dict[str, int]:
    if weights is None or not weights.were_encoded:
        return {}
    roles = assign_roles(weights.tensors.values(), c.config)
    return dict(sorted(Counter(v.role.value for v in roles.values()).items()))


def _find_layout(served: Served) -> tuple[Layout | None, Mapping[str, Any]]:
    """The layout that a configuration names, and its block."""
    if isinstance(block := served.config.get(Fake.config_key), dict):
        return find_layout(Fake.name), block
    found = (x for x in LAYOUTS if served.method in (x.name, *x.aliases))
    return next(found, None) if served.method else None, served.block


def _schemes(served: Served, layout: Layout | None, block: Mapping[str, Any]) -> Iterator[str]:
    """The name of each quantized module's scheme: what the layout reads in the configuration, where the tensors are
    like that; else what the tensors show."""
    for m in served.quantized:
        assert m.stored is not None
        scheme = _believe(layout, block, m.name) if layout else None
        yield scheme.name if scheme and _agree(scheme, m.stored, m.columns) else m.stored.name
    if layout and layout.name == Fake.name:  # to a loader nothing is quantized
        told = (_believe(layout, block, m.name) for m in served.modules.values())
        yield from (scheme.name for scheme in told if scheme)


def _believe(layout: Layout, block: Mapping[str, Any], module: str) -> Scheme | None:
    """What a configuration says. Those of others may lack anything that ours have: then nothing."""
    try:
        return layout.scheme_of(block, module)
    except (LookupError, TypeError, ValueError, AttributeError, StopIteration, re.error, ShardqError):
        return None


def _agree(scheme: Scheme, stored: Stored, columns: int) -> bool:
    """True where tensors and scheme are of one kind. Whether integers have zero points is for the configuration, and
    activations are, unless only the tensors' side knows of them."""
    if (scheme.bits, scheme.group_rows) != (stored.bits, stored.group_rows):
        return False
    if scheme.format.is_integer != (stored.kind == "int") or (scheme.scale == "e8m0") != stored.kind.startswith("mx"):
        return False
    if stored.activation and not scheme.activation:
        return False
    if stored.group_columns == WHOLE_TENSOR or scheme.reach == "tensor":
        return stored.group_columns == WHOLE_TENSOR and scheme.reach == "tensor"
    size = columns if stored.group_columns == WHOLE_ROW else stored.group_columns
    return min(size, columns) == scheme.group_columns(columns)


def _census(c: Checkpoint, verdicts: dict[str, Verdict], quantized: Set[str]) -> tuple[RoleCount, ...]:
    tensors: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for t in c.tensors.values():
        role = "quantized" if t.name in quantized else verdicts[t.name].role.value
        tensors[role] += 1
        sizes[role] += t.size_bytes
    return tuple(RoleCount(r, n, sizes[r]) for r, n in sorted(tensors.items()))
