"""Single experts of models whose stacks hold rows of gate and up in turns: for most readers gate_proj and up_proj are
every other row, for those of some layouts the first and the second half (Layout.halves_experts)."""

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, Final

from shardq.checkpoint import Checkpoint
from shardq.dequantize.hints import read_hints
from shardq.errors import BadTuned, UnsupportedSource
from shardq.families import load_families
from shardq.fused import model_types
from shardq.layouts import find_layout, known_layout
from shardq.recipe import Recipe

if TYPE_CHECKING:
    from shardq.stacks import ExpertStack

ROWS: Final = {True: "a half of the rows of gate and up as they lie", False: "every other row of gate and up"}


def holds_halves(config: Mapping[str, Any] | None) -> bool:
    """True for a checkpoint whose single experts are halves, by its quant_method. It matters only for models whose rows
    take turns."""
    layout = known_layout(read_hints(config).method)
    return layout is not None and layout.halves_experts


def check_tuned_halves(stacks: "Iterable[ExpertStack]", recipe: Recipe) -> None:
    """Raises BadTuned where codes were tuned for a layout that gives gate_proj and up_proj of a stack other rows."""
    tuned = recipe.tuned
    if tuned is None or not tuned.layout:
        return
    if find_layout(tuned.layout).halves_experts == find_layout(recipe.layout).halves_experts:
        return
    from shardq.stacks import INTERLEAVED  # where there are some

    for s in stacks:
        if s.emit == "per_expert" and s.layout in INTERLEAVED:
            raise BadTuned(
                f"{tuned.label} has codes for layout {tuned.layout}, which gives gate_proj and up_proj other rows of "
                f"{s.tensor} than layout {recipe.layout}: tune with --format {recipe.layout}"
            )


def check_halves(checkpoint: Checkpoint, recipe: Recipe) -> None:
    """Raises UnsupportedSource where single experts are halves and the layout's readers want every other row, or the
    reverse: the rows of one would have to be taken of two."""
    halves, wanted = holds_halves(checkpoint.config), find_layout(recipe.layout).halves_experts
    if halves == wanted:
        return
    types = model_types(checkpoint.config)
    rows = (r for r in load_families().stacks if any(fnmatchcase(t, p) for t in types for p in r.model_types))
    fused = (parts for r in rows if r.interleaved for parts in r.written.values() if len(parts) > 1)
    projections = {p for parts in fused for p in parts}
    for name in checkpoint.tensors:
        *_, expert, projection, _ = ("", "", *name.split("."))
        if expert.isdecimal() and projection in projections:
            raise UnsupportedSource(
                f"{name.rpartition('.')[0]} is {ROWS[halves]} in {checkpoint.label}, and readers of layout "
                f"{recipe.layout} expect {ROWS[wanted]}: make it of the model with its experts in stacks"
            )
