"""Policies: Linear layers of blocks that stay in source precision all the same. The table is in families.toml."""

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any, Literal

from shardq.families import PolicyRow, load_families
from shardq.fused import model_types

Policy = Literal["all", "published"]


def kept_modules(modules: Iterable[str], config: Mapping[str, Any] | None, policy: Policy) -> Mapping[str, str]:
    """Module -> id of the row that keeps it; those that no row names are left out, and all of them under `all`.

    `config` is config.json, whose model types choose rows; None: no row. Raises nothing.
    """
    if policy == "all":
        return {}
    types = model_types(config)
    rows = [r for r in load_families().published if any(fnmatchcase(t, p) for t in types for p in r.model_types)]
    leading = {r.id: _find_count(config or {}, r.leading_layers) for r in rows if r.leading_layers}
    kept: dict[str, str] = {}
    for module in modules:
        for row in rows:
            if row.keep.search(module) and _is_in(module, row, leading):
                kept.setdefault(module, row.id)
    return kept


def _is_in(module: str, row: PolicyRow, leading: Mapping[str, int]) -> bool:
    if row.leading_layers is None:
        return True
    layer = load_families().names.layer_index.search(module)
    return layer is not None and int(layer[1]) < leading[row.id]


def _find_count(table: Mapping[str, Any], key: str | None) -> int:
    """The largest number that the key has at any depth; 0 if none."""
    own = table.get(key) if key is not None else None
    found = [own] if isinstance(own, int) and not isinstance(own, bool) else []
    return max([*found, *(_find_count(v, key) for v in table.values() if isinstance(v, Mapping))], default=0)
