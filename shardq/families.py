"""Loads families.toml, the data behind roles and source kinds, into frozen values."""

import functools
import re
import tomllib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, get_args

Grid = Literal["any", "scalar", "row", "group32", "packed6", "awq"]
Rows = Literal["same", "blocks", "opaque"]
Orientation = Literal["infer", "oi", "io"]
Emit = Literal["per_expert", "stacked"]


@dataclass(frozen=True, slots=True)
class NameRules:
    """What the segments of a tensor's name say; each field is explained in families.toml."""

    block: re.Pattern[str]
    head: frozenset[str]
    vocab_head: frozenset[str]
    embed: re.Pattern[str]
    tables: frozenset[str]
    norm: re.Pattern[str]
    conv: re.Pattern[str]
    router: re.Pattern[str]
    moe_parent: re.Pattern[str]
    projection: re.Pattern[str]
    mtp: re.Pattern[str]
    layer_index: re.Pattern[str]
    nontext: re.Pattern[str]
    small: re.Pattern[str]
    gate_like: re.Pattern[str]
    gate_like_max: int
    min_dim: int


@dataclass(frozen=True, slots=True)
class ConfigKeys:
    """Where config.json keeps the numbers that the rules need."""

    vocab_size: re.Pattern[str]
    expert_count: frozenset[str]
    layer_count: frozenset[str]
    text: frozenset[str]
    hidden_size: frozenset[str]
    expert_size: frozenset[str]


@dataclass(frozen=True, slots=True)
class ExpertRules:
    """How stacks of experts are named."""

    container: re.Pattern[str]
    stacked: re.Pattern[str]
    projections: frozenset[str]

    def is_stack(self, name: str, shape: tuple[int, ...] | None) -> bool:
        """True for a tensor that is named like a stack and has three dimensions or more; where shapes are not known, if
        the name alone tells: a raw parameter, or a weight that `stacked` names."""
        split = self.split(name)
        if split is None:
            return False
        if shape is not None:
            return len(shape) >= 3
        return not name.endswith(".weight") or self.stacked.search(name.removesuffix(".weight")) is not None

    def split(self, name: str) -> tuple[str, str] | None:
        """Container and projection of a tensor named like a stack, else None: `a.experts` and `w13` for
        `a.experts.w13_weight`, `a.moe` and `down_proj` for `a.moe.down_proj.weight`."""
        module, _, leaf = name.rpartition(".")
        container, _, projection = module.rpartition(".") if leaf == "weight" else (module, "", leaf)
        projection = projection if leaf == "weight" else projection.removesuffix("_weight")
        if projection not in self.projections or self.container.search(container) is None:
            return None
        return container, projection


@dataclass(frozen=True, slots=True)
class StackRow:
    """One way to stack the experts of a layer; each field is explained in families.toml."""

    id: str
    model_types: tuple[str, ...]  # globs, empty: any
    container: re.Pattern[str]
    written: Mapping[str, tuple[str, ...]]  # stack -> projections in its slices, as loaders call them
    down: str  # the stack of the matrix that leads back to the hidden size
    orientation: Orientation
    interleaved: bool
    emit: Emit

    @property
    def members(self) -> tuple[str, ...]:
        """All stacks of a group."""
        return tuple(self.written)

    @property
    def fused(self) -> bool:
        """True where a slice holds gate and up."""
        return any(len(parts) > 1 for parts in self.written.values())

    def fits(self, container: str, stacks: Collection[str], types: frozenset[str]) -> bool:
        """True if all members are among `stacks` of `container` in a model of `types`."""
        named = not self.model_types or any(fnmatchcase(t, p) for t in types for p in self.model_types)
        return named and all(m in stacks for m in self.written) and self.container.search(container) is not None


@dataclass(frozen=True, slots=True)
class Keep3D:
    """A known three-dimensional tensor that is no stack of experts."""

    id: str
    pattern: re.Pattern[str]
    role: str  # value of a Role


@dataclass(frozen=True, slots=True)
class Family:
    """Models that differ from the default rule; each field is explained in families.toml."""

    id: str
    model_types: tuple[str, ...]  # globs
    transposed: frozenset[str]
    wide: frozenset[str]
    diffusers: bool
    probe: re.Pattern[str] | None
    only: re.Pattern[str] | None
    block: re.Pattern[str] | None
    nontext: re.Pattern[str] | None
    keep: tuple[re.Pattern[str], ...]


@dataclass(frozen=True, slots=True)
class PolicyRow:
    """What published recipes keep in high precision; each field is explained in families.toml."""

    id: str
    model_types: tuple[str, ...]  # globs
    keep: re.Pattern[str]
    leading_layers: str | None  # key of config.json


@dataclass(frozen=True, slots=True)
class FusedRow:
    """Modules that a server runs as one matrix; each field is explained in families.toml."""

    id: str
    members: tuple[str, ...]  # last segments, in the server's order
    parent: re.Pattern[str]
    model_types: frozenset[str]  # empty: any
    runs_as: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class SourceKind:
    """One way to store quantized weights; each field is explained in families.toml."""

    id: str
    codes: str
    dtypes: frozenset[str]
    scale: str
    scale_dtypes: frozenset[str]
    requires: tuple[str, ...]
    parts: tuple[str, ...]
    grid: Grid
    ndim: int
    by_name: bool
    rows: Rows


@dataclass(frozen=True, slots=True)
class RefusedSource:
    """A quantized source that is not read; each field is explained in families.toml."""

    id: str
    methods: frozenset[str]
    leaves: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Families:
    """All of families.toml."""

    names: NameRules
    config: ConfigKeys
    experts: ExpertRules
    stacks: tuple[StackRow, ...]
    keep_3d: tuple[Keep3D, ...]
    families: tuple[Family, ...]
    published: tuple[PolicyRow, ...]
    fused: tuple[FusedRow, ...]
    sources: tuple[SourceKind, ...]
    lone: Mapping[str, str]  # last name part -> id of the source kind
    companion_roles: Mapping[str, str]  # suffix -> what the tensor is for
    dropped: Mapping[str, str]  # last name part -> reason
    refused: tuple[RefusedSource, ...]


@functools.cache
def load_families() -> Families:
    """The rules that ship with shardq; KeyError or ValueError if the file is wrong, a bug."""
    text = Path(__file__).with_name("families.toml").read_text(encoding="utf-8")
    return parse_families(text)


def parse_families(text: str) -> Families:
    """Rules from TOML text of the form of families.toml."""
    table = tomllib.loads(text)
    stacks = tuple(_stack(row) for row in table["stack"])
    projections = frozenset(name for row in stacks for name in row.members)
    return Families(
        names=_names(table["names"]),
        config=_config(table["config"]),
        experts=ExpertRules(
            re.compile(table["experts"]["container"]), re.compile(table["experts"]["stacked"]), projections
        ),
        stacks=stacks,
        keep_3d=tuple(Keep3D(row["id"], re.compile(row["pattern"]), row["role"]) for row in table["keep_3d"]),
        families=tuple(_family(row) for row in table["family"]),
        published=tuple(_policy(row) for row in table["published"]),
        fused=tuple(_fused(row) for row in table["fused"]),
        sources=tuple(_source(row) for row in table["source"]),
        lone=MappingProxyType(table["lone"]),
        companion_roles=MappingProxyType(table.get("companion_roles", {})),
        dropped=MappingProxyType(table.get("dropped", {})),
        refused=tuple(_refused(row) for row in table.get("refused", ())),
    )


def _names(table: Mapping[str, Any]) -> NameRules:
    return NameRules(
        block=re.compile(table["block"]),
        head=frozenset(table["head"]),
        vocab_head=frozenset(table["vocab_head"]),
        embed=re.compile(table["embed"]),
        tables=frozenset(table["tables"]),
        norm=re.compile(table["norm"]),
        conv=re.compile(table["conv"]),
        router=re.compile(table["router"]),
        moe_parent=re.compile(table["moe_parent"]),
        projection=re.compile(table["projection"]),
        mtp=re.compile(table["mtp"]),
        layer_index=re.compile(table["layer_index"]),
        nontext=re.compile(table["nontext"]),
        small=re.compile(table["small"]),
        gate_like=re.compile(table["gate_like"]),
        gate_like_max=table["gate_like_max"],
        min_dim=table["min_dim"],
    )


def _config(table: Mapping[str, Any]) -> ConfigKeys:
    return ConfigKeys(
        vocab_size=re.compile(table["vocab_size"]),
        expert_count=frozenset(table["expert_count"]),
        layer_count=frozenset(table["layer_count"]),
        text=frozenset(table["text"]),
        hidden_size=frozenset(table["hidden_size"]),
        expert_size=frozenset(table["expert_size"]),
    )


def _stack(row: Mapping[str, Any]) -> StackRow:
    orientation, emit = row.get("orientation", "infer"), row.get("emit", "per_expert")
    if orientation not in get_args(Orientation) or emit not in get_args(Emit):
        raise ValueError(f"families.toml: stack {row['id']}: orientation {orientation!r}, emit {emit!r}")
    return StackRow(
        id=row["id"],
        model_types=tuple(row.get("model_types", ())),
        container=re.compile(row.get("container", "")),
        written=MappingProxyType({name: tuple(parts) for name, parts in row["written"].items()}),
        down=row["down"],
        orientation=orientation,
        interleaved=row.get("interleaved", False),
        emit=emit,
    )


def _family(row: Mapping[str, Any]) -> Family:
    return Family(
        id=row["id"],
        model_types=tuple(row.get("model_types", ())),
        transposed=frozenset(row.get("transposed", ())),
        wide=frozenset(row.get("wide", ())),
        diffusers=row.get("diffusers", False),
        probe=_optional(row.get("probe")),
        only=_optional(row.get("only")),
        block=_optional(row.get("block")),
        nontext=_optional(row.get("nontext")),
        keep=tuple(re.compile(p) for p in row.get("keep", ())),
    )


def _optional(pattern: str | None) -> re.Pattern[str] | None:
    return None if pattern is None else re.compile(pattern)


def _policy(row: Mapping[str, Any]) -> PolicyRow:
    return PolicyRow(row["id"], tuple(row["model_types"]), re.compile(row["keep"]), row.get("leading_layers"))


def _fused(row: Mapping[str, Any]) -> FusedRow:
    return FusedRow(
        id=row["id"],
        members=tuple(row["members"]),
        parent=re.compile(row.get("parent", "")),
        model_types=frozenset(row.get("model_types", ())),
        runs_as=tuple(row.get("runs_as", ())),
    )


def _source(row: Mapping[str, Any]) -> SourceKind:
    grid, rows = row.get("grid", "any"), row.get("rows", "same")
    if grid not in get_args(Grid) or rows not in get_args(Rows):
        raise ValueError(f"families.toml: source {row['id']}: grid {grid!r}, rows {rows!r}")
    return SourceKind(
        id=row["id"],
        codes=row["codes"],
        dtypes=frozenset(row["dtypes"]),
        scale=row["scale"],
        scale_dtypes=frozenset(row.get("scale_dtypes", ())),
        requires=tuple(row.get("requires", ())),
        parts=tuple(row.get("parts", ())),
        grid=grid,
        ndim=row.get("ndim", 0),
        by_name=row.get("by_name", False),
        rows=rows,
    )


def _refused(row: Mapping[str, Any]) -> RefusedSource:
    return RefusedSource(id=row["id"], methods=frozenset(row.get("methods", ())), leaves=tuple(row.get("leaves", ())))
