"""Fused groups: modules that a server runs as one matrix, by their names alone. The table is in families.toml."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from shardq.families import FusedRow, load_families


def fused_groups(modules: Iterable[str], config: Mapping[str, Any] | None) -> Mapping[str, tuple[str, ...]]:
    """Module -> all members of its group that are among `modules`, in the order of the table; itself included.

    Modules that stand alone are left out. `config` is config.json, whose model types choose rows; None: rows for any
    model only. The order of `modules` does not matter. Raises nothing.
    """
    rows = _rows_for(model_types(config))
    segments = frozenset(member for row in rows for member in row.members)
    present: dict[str, set[str]] = {}  # parent -> last segments of the table that it has
    for module in modules:
        parent, dot, segment = module.rpartition(".")
        if segment in segments:
            present.setdefault(parent + dot, set()).add(segment)
    groups: dict[str, tuple[str, ...]] = {}
    for parent, found in present.items():
        for row in rows:
            members = [m for m in row.members if m in found]
            if len(members) < 2 or not row.parent.search(parent.removesuffix(".")):
                continue
            found.difference_update(members)
            group = tuple(parent + m for m in members)
            groups.update(dict.fromkeys(group, group))
    return groups


def fused_names(group: Sequence[str]) -> tuple[str, ...]:
    """Names that servers give to the one matrix of a group of `fused_groups`; empty where none is recorded."""
    parent = group[0].rpartition(".")[0]
    segments = [m.rpartition(".")[2] for m in group]
    rows = (r for r in load_families().fused if all(s in r.members for s in segments))
    return tuple(f"{parent}.{name}" for r in rows for name in r.runs_as)


def model_types(config: Mapping[str, Any] | None) -> frozenset[str]:
    """Every `model_type` in a config, at any depth of tables."""
    found: set[str] = set()
    waiting: list[Mapping[str, Any]] = [config or {}]
    while waiting:
        for key, value in waiting.pop().items():
            if isinstance(value, Mapping):
                waiting.append(value)
            elif key == "model_type" and isinstance(value, str):
                found.add(value)
    return frozenset(found)


def _rows_for(types: frozenset[str]) -> tuple[FusedRow, ...]:
    return tuple(r for r in load_families().fused if not r.model_types or not r.model_types.isdisjoint(types))
