"""How servers cut matrices over devices: column-parallel ones along their rows (the output), row-parallel ones along
their columns (the input), replicated ones not at all.

Which is which follows from the last segment: `[parallel]` of engines.toml. Source: vLLM 0.32 `linear.py`; SGLang has
the same code.
"""

import functools
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

Cut = Literal["rows", "columns", "none"]
WHOLE_ROLES: Final = frozenset({"router", "nontext", "embedding", "head"})


@dataclass(frozen=True, slots=True)
class Cuts:
    """Last segments by how their matrix is cut; all others along their rows."""

    columns: frozenset[str]
    replicated: frozenset[str]


@functools.cache
def load_cuts() -> Cuts:
    """From engines.toml."""
    table = tomllib.loads(Path(__file__).with_name("table").joinpath("engines.toml").read_text(encoding="utf-8"))
    return Cuts(frozenset(table["parallel"]["columns"]), frozenset(table["parallel"]["replicated"]))


def cut_of(segment: str, role: str) -> Cut:
    """How a server cuts a matrix whose name ends in `segment`."""
    cuts = load_cuts()
    if segment in cuts.replicated or role in WHOLE_ROLES:
        return "none"
    return "columns" if segment in cuts.columns else "rows"
