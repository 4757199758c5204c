"""Loads families.toml, the data behind roles and source kinds, into frozen values."""

import functools
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from types import MappingProxyType
from typing import Any, Literal, get_args

Grid = Literal["any", "scalar", "row", "group32", "packed6", "awq"]
Rows = Literal["same", "blocks", "opaque"]


@dataclass(frozen=True, slots=True)
class NameRules:
    """What the segments of a tensor's name say; each field is explained in families.toml."""

    block: re.Pattern[str]
    head: frozenset[str]
    vocab_head: frozenset[str]
    embed: re.Pattern[str]
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


@dataclass(frozen=True, slots=True)
class ExpertRules:
    """How stacks of experts are named."""

    container: re.Pattern[str]
    projections: frozenset[str]


@dataclass(frozen=True, slots=True)
class Keep3D:
    """A known three-dimensional tensor that is no stack of experts."""

    id: str
    pattern: re.Pattern[str]
    role: str  # value of a Role


@dataclass(frozen=True, slots=True)
class Family:
    """Model types that differ from the default rule."""

    id: str
    model_types: frozenset[str]
    transposed: frozenset[str]  # last segments of modules whose weight is [in, out]
    wide: frozenset[str]  # those of them that give the family away by being wider than tall


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
    keep_3d: tuple[Keep3D, ...]
    families: tuple[Family, ...]
    fused: tuple[FusedRow, ...]
    sources: tuple[SourceKind, ...]
    lone: Mapping[str, str]  # last name part -> id of the source kind
    companion_roles: Mapping[str, str]  # suffix -> what the tensor is for
    dropped: Mapping[str, str]  # last name part -> reason
    refused: tuple[RefusedSource, ...]


@functools.cache
def load_families() -> Families:
    """The rules that ship with shardq; KeyError or ValueError if the file is wrong, a bug."""
    text = resources.files("shardq").joinpath("families.toml").read_text(encoding="utf-8")
    return parse_families(text)


def parse_families(text: str) -> Families:
    """Rules from TOML text of the form of families.toml."""
    table = tomllib.loads(text)
    return Families(
        names=_names(table["names"]),
        config=_config(table["config"]),
        experts=ExpertRules(re.compile(table["experts"]["container"]), frozenset(table["experts"]["projections"])),
        keep_3d=tuple(Keep3D(row["id"], re.compile(row["pattern"]), row["role"]) for row in table["keep_3d"]),
        families=tuple(_family(row) for row in table["family"]),
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
    )


def _family(row: Mapping[str, Any]) -> Family:
    return Family(
        id=row["id"],
        model_types=frozenset(row["model_types"]),
        transposed=frozenset(row["transposed"]),
        wide=frozenset(row["wide"]),
    )


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
