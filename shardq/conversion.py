"""Which weights of a quantized source go into the output with the codes that they have."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from shardq.carry import Goal, carried_dtype, carried_scheme, fits, goal, is_certain, needs_largest, no_scheme
from shardq.carry import target_scheme as nearest_scheme
from shardq.checkpoint import Checkpoint, TensorRef
from shardq.dequantize.base import PLAIN
from shardq.dequantize.hints import Hints, read_hints
from shardq.errors import NotExact, NothingToQuantize
from shardq.layouts import find_layout
from shardq.layouts.base import Layout
from shardq.layouts.input_scales import wants_input_scale
from shardq.recipe import Recipe
from shardq.schemes import Scheme
from shardq.shared_scales import split_groups

if TYPE_CHECKING:
    from shardq.decide import Decision
    from shardq.dequantize.base import Encoded
    from shardq.patterns import Pattern

SHOWN: Final = 4  # reasons told in a message before "and N more"


@dataclass(frozen=True, slots=True)
class Carried:
    """How a weight is carried: the type that it gets, and where its codes go."""

    dtype: str
    goal: Goal


def carry_certain(decisions: Sequence["Decision"], checkpoint: Checkpoint, recipe: Recipe) -> tuple["Decision", ...]:
    """Decisions of `quantize`: a weight that has the wanted numbers already is carried, where that cannot fail, and
    where all that is served as one matrix with it has its global scale, or none has one. Not for `requantize`."""
    hints, layout = read_hints(checkpoint.config), find_layout(recipe.layout)
    known: dict[object, Carried | None] = {}  # equal experts by the hundred thousand: each form is judged once
    carried = [_carry_one(d, hints, layout, recipe.scheme, known) if d.scheme else d for d in decisions]
    split = {} if recipe.split_fused or not layout.fuses else split_groups(carried, checkpoint)
    return tuple(old if old.tensor.module in split else new for old, new in zip(decisions, carried, strict=True))


def _carry_one(
    d: "Decision", hints: Hints, layout: Layout, default: Scheme, known: "dict[object, Carried | None]"
) -> "Decision":
    e = matrix_of(d.tensor)
    assert d.scheme is not None
    if e is None or e.element != d.scheme.element or wants_input_scale(layout, d.scheme):
        return d  # what gets a scale of its activations by tuning gets its codes there, too
    form = (_form(e), d.scheme, id(hints.own(d.tensor.module)))
    if form not in known:
        known[form] = _find_certain(e, d.scheme, d.tensor.module, hints, layout, default)
    found = known[form]
    return d if found is None else _with(d, found)


def _find_certain(
    e: "Encoded", scheme: Scheme, module: str, hints: Hints, layout: Layout, default: Scheme
) -> "Carried | None":
    own = carried_scheme(e, hints, True if scheme.symmetric and hints.symmetric(module) else None)
    if own is None or fits(e, own, scheme, layout, default) is not None:
        return None
    found = _carried(e, own, scheme, layout)
    return found if is_certain(e, own, found.goal) and not needs_largest(e, found.goal) else None


def _form(e: "Encoded") -> object:
    """All of an encoded weight but its name and place."""
    parts = tuple((p.role, p.dtype, p.lines, p.width, p.axis, p.units, p.per_rows) for p in e.parts)
    return e.kind, e.rows, e.columns, e.dtype, e.element, e.block, e.zero_added, e.offset, e.pick, e.transposed, parts


def decide_conversion(kept: Sequence["Decision"], checkpoint: Checkpoint, recipe: Recipe) -> tuple["Decision", ...]:
    """Decisions of `convert`, made of those that keep everything: each encoded matrix is carried, but for what --ignore
    names. With --requantize those that cannot be carried for certain are quantized anew, and so is all that is served
    as one matrix and does not share its global scale.

    Raises NotExact with the list of those that cannot, NothingToQuantize.
    """
    hints, layout, label = read_hints(checkpoint.config), find_layout(recipe.layout), checkpoint.label
    decided: list[Decision] = []
    lost: dict[str, list[str]] = {}  # reason -> weights
    for d in kept:
        e = matrix_of(d.tensor)
        if e is None or _is_ignored(d.tensor, recipe.ignore):
            decided.append(d)
            continue
        made = _convert_one(d, e, hints, layout, recipe)
        if isinstance(made, str):
            lost.setdefault(made, []).append(d.tensor.name)
        else:
            decided.append(made)
    split = split_groups(decided, checkpoint) if layout.fuses else {}
    for at, d in enumerate(decided):
        group = split.get(d.tensor.module, ())
        if group and recipe.requantize:
            decided[at] = replace(kept[at], rule="requantize", action="quantize", scheme=recipe.scheme)
        elif group:
            what = ", ".join(m.rpartition(".")[2] for m in group)
            lost.setdefault(f"shares no global scale with what servers run as one matrix ({what})", []).append(
                d.tensor.name
            )
    if lost:
        raise NotExact(
            f"{sum(map(len, lost.values()))} weights of {label} cannot be carried: {_told(lost)}; take another --to, "
            "decode them with --ignore, or --requantize, which makes new codes"
        )
    if not any(d.scheme for d in decided):
        raise NothingToQuantize(f"nothing to convert in {label}: its weights are plain")
    return tuple(decided)


def _convert_one(d: "Decision", e: "Encoded", hints: Hints, layout: Layout, recipe: Recipe) -> "Decision | str":
    """The decision, or why there is none."""
    own = carried_scheme(e, hints, recipe.symmetric)
    found = None if own is None else nearest_scheme(e, own, layout, recipe.scheme)
    if own is not None and found is not None:
        made = _carried(e, own, found, layout)
        if not recipe.requantize or is_certain(e, own, made.goal):
            return _with(d, made)
    if recipe.requantize and layout.refuse(recipe.scheme, recipe.scheme, e.rows, e.columns) is None:
        return replace(d, rule="requantize", action="quantize", scheme=recipe.scheme)
    reason = no_scheme(e, hints) if own is None else fits(e, own, layout.settle(own), layout, recipe.scheme)
    return reason or f"fits no scheme of layout {layout.name}"


def _told(lost: Mapping[str, Sequence[str]]) -> str:
    """Each reason with the first weight that it is of."""
    texts = [
        names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "") + f": {reason}"
        for reason, names in lost.items()
    ]
    return "; ".join(texts[:SHOWN]) + (f"; and {len(texts) - SHOWN} more reasons" if len(texts) > SHOWN else "")


def common_scheme(tensors: Sequence[TensorRef], config: Mapping[str, Any] | None, recipe: Recipe) -> Scheme | None:
    """The scheme that most encoded matrices have in the layout; None where none fits."""
    hints, layout = read_hints(config), find_layout(recipe.layout)
    found: Counter[Scheme] = Counter()
    for t in tensors:
        e = matrix_of(t)
        own = carried_scheme(e, hints, recipe.symmetric) if e and not _is_ignored(t, recipe.ignore) else None
        target = nearest_scheme(e, own, layout) if e and own else None
        if target:
            found[target] += 1
    return found.most_common(1)[0][0] if found else None


def matrix_of(t: TensorRef) -> "Encoded | None":
    """How a matrix is encoded; None for a stack, and for what is plain or has other numbers than its codes."""
    e = t.encoded[0] if len(t.encoded) == 1 else None
    return None if e is None or e.kind == PLAIN or e.index is not None or e.scaling else e


def _carried(e: "Encoded", own: Scheme, scheme: Scheme, layout: Layout) -> Carried:
    dtype = carried_dtype(e, own, scheme, layout)
    return Carried(dtype, goal(layout, scheme, dtype, e.rows, e.columns))


def _with(d: "Decision", found: Carried) -> "Decision":
    t = d.tensor if d.tensor.dtype == found.dtype else replace(d.tensor, dtype=found.dtype)
    return replace(d, tensor=t, action="quantize", scheme=found.goal.scheme, goal=found.goal)


def _is_ignored(t: TensorRef, ignore: "Sequence[Pattern]") -> bool:
    return any(p.matches(n) for p in ignore for n in (t.module, t.name))
