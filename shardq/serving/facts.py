"""Loads table/: what is known of each engine, one row for each thing."""

import functools
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, get_args

from shardq.serving.conditions import CONDITIONS

Answer = Literal["loads", "limits", "no"]
FILES: Final = ("engines.toml", "general.toml", "compressed_tensors.toml", "other_methods.toml")
ROLES: Final = ("head", "embedding", "expert", "linear")


@dataclass(frozen=True, slots=True)
class Engine:
    """One loader."""

    id: str
    version: str  # that the rows are about
    methods: frozenset[str]  # quantization methods that it reads at all
    unknown: str  # what it does with others
    source: str
    fuses: bool  # it runs fused groups as one matrix
    parallel: bool  # it cuts matrices over devices


@dataclass(frozen=True, slots=True)
class Fact:
    """One thing that an engine does with some checkpoints; each field is explained in table/general.toml."""

    id: str
    engines: tuple[str, ...]
    answer: Answer
    reason: str
    source: str
    methods: frozenset[str]
    kinds: frozenset[str]
    bits: frozenset[int]
    symmetric: bool | None
    activation: bool | None
    blocks: bool | None
    groups: frozenset[int]
    role: str
    device: str
    check: str
    parallel: bool


@dataclass(frozen=True, slots=True)
class Facts:
    """All of table/."""

    engines: tuple[Engine, ...]
    facts: tuple[Fact, ...]


@functools.cache
def load_facts() -> Facts:
    """The tables that ship with shardq; KeyError or ValueError if they are wrong, a bug."""
    folder = Path(__file__).with_name("table")
    return parse_facts("\n".join(folder.joinpath(name).read_text(encoding="utf-8") for name in FILES))


def parse_facts(text: str) -> Facts:
    """From TOML text of the form of the files in table/, one after the other."""
    table = tomllib.loads(text)
    engines = tuple(_engine(row) for row in table["engine"])
    return Facts(engines, tuple(_fact(row, {e.id for e in engines}) for row in table["fact"]))


def _engine(row: Mapping[str, Any]) -> Engine:
    return Engine(
        row["id"], row["version"], frozenset(row["methods"]), row["unknown"], row["source"], row["fuses"],
        row["parallel"],
    )  # fmt: skip


def _fact(row: Mapping[str, Any], engines: set[str]) -> Fact:
    fact = Fact(
        id=row["id"],
        engines=tuple(row["engines"]),
        answer=row["answer"],
        reason=row["reason"],
        source=row["source"],
        methods=frozenset(row.get("methods", ())),
        kinds=frozenset(row.get("kinds", ())),
        bits=frozenset(row.get("bits", ())),
        symmetric=row.get("symmetric"),
        activation=row.get("activation"),
        blocks=row.get("blocks"),
        groups=frozenset(row.get("groups", ())),
        role=row.get("role", ""),
        device=row.get("device", ""),
        check=row.get("check", ""),
        parallel=row.get("parallel", False),
    )
    known = {f.name for f in Fact.__dataclass_fields__.values()}
    if (
        not set(fact.engines) <= engines
        or fact.answer not in get_args(Answer)
        or (fact.check and fact.check not in CONDITIONS)
        or fact.role not in ("", *ROLES)
        or not set(row) <= known
    ):
        raise ValueError(f"serving table: row {fact.id} has a value that is not known")
    return fact
