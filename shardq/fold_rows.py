"""Loads folds.toml: how the layers of some models can be folded."""

import functools
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

Heads = Literal["none", "grouped", "latent"]


@dataclass(frozen=True, slots=True)
class NormFold:
    """A norm whose output feeds matrices; each field is explained in folds.toml."""

    norm: str
    of: tuple[str, ...]
    also: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class PairFold:
    """A matrix whose rows are the columns of another; each field is explained in folds.toml."""

    rows: str
    columns: str
    heads: Heads


@dataclass(frozen=True, slots=True)
class FoldRow:
    """How the layers of some models can be folded; each field is explained in folds.toml."""

    id: str
    model_types: tuple[str, ...]  # globs
    adds: float
    norms: tuple[NormFold, ...]
    pairs: tuple[PairFold, ...]
    others: frozenset[str]


@functools.cache
def load_folds() -> tuple[FoldRow, ...]:
    """The rows that ship with shardq; KeyError or ValueError if the file is wrong, a bug."""
    text = Path(__file__).with_name("folds.toml").read_text(encoding="utf-8")
    return tuple(_fold(row) for row in tomllib.loads(text)["fold"])


def _fold(row: Mapping[str, Any]) -> FoldRow:
    pairs = tuple(PairFold(p["rows"], p["columns"], p.get("heads", "none")) for p in row["pairs"])
    if wrong := [p.heads for p in pairs if p.heads not in get_args(Heads)]:
        raise ValueError(f"folds.toml: fold {row['id']}: heads {wrong[0]!r}")
    return FoldRow(
        id=row["id"],
        model_types=tuple(row["model_types"]),
        adds=row.get("adds", 0.0),
        norms=tuple(NormFold(n["norm"], tuple(n["of"]), tuple(n["also"])) for n in row["norms"]),
        pairs=pairs,
        others=frozenset(row["others"]),
    )
