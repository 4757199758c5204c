"""How much more a kind of matrix matters to a model than the error of its own output says, by name and layer.

A score looks at one matrix, and what its error does to the rest of the model would take a forward pass. What stands in
for that is experience: value projections, which heads share, and the feed-forward parts of the first and last layers do
more damage than others that are hurt alike, queries and keys less. llama.cpp's mixtures give more bits and fewer to the
same ones (llama-quant.cpp: `attn_v`, `attn_q`, `attn_k`, `use_more_bits`). Factors are from one
decoder: bench/README.md.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

EDGE: Final = 8  # the first and the last of so many parts of the layers
_NUMBER: Final = re.compile(r"(?<![^.])\d+(?![^.])")  # a segment of a name


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """What the damage of some modules is multiplied by."""

    modules: re.Pattern[str]  # found in their names
    factor: float
    edges: bool = False  # of the first and last layers alone


SENSITIVITIES: Final = (
    Sensitivity(re.compile(r"(^|\.)(v_proj|value|wv)\Z"), 2.0),
    Sensitivity(re.compile(r"(^|\.)([qk]_proj|query|key|w[qk])\Z"), 0.5),
    Sensitivity(re.compile(r"(^|\.)(mlp|ffn|feed_forward|block_sparse_moe)\."), 8.0, edges=True),
)


def weigh_modules(modules: Iterable[str]) -> Mapping[str, float]:
    """Module -> its factor; 1 where nothing is known. A layer is the first number of a name, and there are as many
    layers as `modules` show, each kind of name before that number counted alone. Raises nothing."""
    places = {m: _place(m) for m in modules}
    layers: dict[str, int] = {}
    for prefix, layer in filter(None, places.values()):
        layers[prefix] = max(layers.get(prefix, 0), layer + 1)
    return {m: _factor(m, place is not None and _is_edge(place[1], layers[place[0]])) for m, place in places.items()}


def _place(module: str) -> tuple[str, int] | None:
    found = _NUMBER.search(module)
    return (module[: found.start()], int(found[0])) if found else None


def _is_edge(layer: int, layers: int) -> bool:
    return min(layer, layers - 1 - layer) < layers // EDGE


def _factor(module: str, edge: bool) -> float:
    return next((s.factor for s in SENSITIVITIES if s.modules.search(module) and (edge or not s.edges)), 1.0)
