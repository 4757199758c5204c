"""Which tensors are quantized, under which scheme, and why: roles, then the recipe, then what the layout can hold."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from shardq.agreement import agree
from shardq.checkpoint import Checkpoint, TensorRef
from shardq.errors import (
    BadGroupSize,
    BadOption,
    LayoutRefuses,
    NothingToQuantize,
    PatternMatchesNothing,
    UnknownTensor,
    UnsupportedSource,
)
from shardq.families import load_families
from shardq.formats import WEIGHT_DTYPES
from shardq.layouts import find_layout
from shardq.patterns import LayerRule, Pattern
from shardq.policy import kept_modules
from shardq.recipe import Recipe
from shardq.roles import Role, Verdict, assign_roles, prediction_tensors
from shardq.schemes import Scheme, change_scheme, parse_scheme
from shardq.untied import HEADS, says_tied
from shardq.weights import Weights, find_weights, taken_parts

if TYPE_CHECKING:
    from shardq.carry import Goal

FITTING_GROUPS = (1024, 512, 256, 128, 64, 32, 16)  # what the loaders' kernels take, largest first
# Roles whose tensors are plain [out, in] matrices, so that --include and exact --layer-config names may quantize them.
MATRIX_ROLES = frozenset({Role.LINEAR, Role.HEAD, Role.ROUTER, Role.MTP, Role.NONTEXT, Role.OUTSIDE_BLOCK, Role.SMALL})
SHOWN = 6  # names listed in a message before "and N more"


@dataclass(frozen=True, slots=True)
class Decision:
    """What becomes of one weight, or other tensor of the source."""

    tensor: TensorRef
    role: Role
    rule: str  # what decided: a rule of the role table, "ragged:...", or the option with its pattern, as "ignore:..."
    action: Literal["quantize", "copy", "drop"]
    scheme: Scheme | None  # None unless quantized
    goal: "Goal | None" = None  # where its codes are carried, if they are

    @property
    def carried(self) -> bool:
        """True if it keeps the codes that it has in the source."""
        return self.goal is not None


def decide(checkpoint: Checkpoint, recipe: Recipe) -> tuple[Decision, ...]:
    """`decide_weights` of what a checkpoint stands for. Raises UnsupportedSource and what that raises."""
    return decide_weights(find_weights(checkpoint, recipe), checkpoint, recipe)


def decide_weights(weights: Weights, checkpoint: Checkpoint, recipe: Recipe) -> tuple[Decision, ...]:
    """One decision for every weight, in order.

    Raises UnsupportedSource, UnknownTensor, PatternMatchesNothing, BadOption, BadGroupSize, LayoutRefuses,
    FusedGroupSplit and NothingToQuantize; all of them before any weight is read.
    """
    tensors = tuple(weights.tensors.values())
    roles = assign_roles(tensors, checkpoint.config, taken_parts(recipe))
    if recipe.purpose != "quantize":
        kept = tuple(
            Decision(t, roles[t.name].role, roles[t.name].rule, "copy", None) for t in weights.tensors.values()
        )
        if recipe.purpose == "convert":
            from shardq.conversion import decide_conversion

            return decide_conversion(kept, checkpoint, recipe)
        if not weights.were_encoded:
            raise NothingToQuantize(f"nothing to dequantize in {checkpoint.label}: its weights are plain")
        return kept
    modules = {t.module for t in tensors if _is_weight(t)}
    stopping = [t for t in tensors if not _is_weight(t) and roles[t.name].role in (Role.UNKNOWN, Role.EXPERT_STACK)]
    _check_patterns(recipe, modules, modules | {n for t in stopping for n in (t.module, t.name)})
    exact = {r.pattern.body if r.pattern.kind == "exact" else r.pattern.text: r for r in recipe.layer_rules}
    also = _also_wanted(tensors, roles, recipe, checkpoint.config or {})
    dropped = prediction_tensors(tensors, checkpoint.config) if recipe.mtp == "drop" else frozenset()
    _check_dropped([t for t in tensors if t.name in dropped], recipe)
    policy = kept_modules(modules, checkpoint.config, recipe.policy)
    decisions = tuple(
        Decision(t, roles[t.name].role, "mtp:drop", "drop", None)
        if t.name in dropped
        else _decide_one(t, roles[t.name], recipe, exact, also, policy)
        for t in tensors
    )
    _refuse_unknown(decisions)
    _check_head(checkpoint, recipe, decisions)
    decisions = _fit_layout(decisions, recipe)
    if find_layout(recipe.layout).fuses and not recipe.split_fused:
        decisions = agree(decisions, checkpoint.config)
    if not any(d.action == "quantize" for d in decisions):
        raise NothingToQuantize(
            f"nothing to quantize in {checkpoint.label}: none of its {len(tensors)} tensors is a Linear weight that "
            "the recipe selects; `shardq inspect` shows the role of each"
        )
    if recipe.requantize or not any(d.tensor.encoded for d in decisions):
        return decisions
    from shardq.conversion import carry_certain  # with all that is known of codes that others made

    return carry_certain(decisions, checkpoint, recipe)


def _check_dropped(dropped: Sequence[TensorRef], recipe: Recipe) -> None:
    """No option may ask for what --mtp drop leaves out."""
    for option, patterns in (
        ("--include", recipe.include),
        ("--layer-config", tuple(r.pattern for r in recipe.layer_rules if r.pattern.kind == "exact")),
    ):
        for p in patterns:
            for t in dropped:
                if p.matches(t.module):
                    raise BadOption(
                        f"{option} {p.text!r} asks for {t.module}, and --mtp drop leaves it out; take one of them back"
                    )


def _is_weight(t: TensorRef) -> bool:
    return t.name.endswith(".weight") and (t.shape is None or len(t.shape) == 2)


def _is_head(t: TensorRef, verdict: Verdict) -> bool:
    """A head of the whole model; inside numbered blocks the same names mean something else (`attention.output`)."""
    return verdict.role is Role.HEAD and not any(part.isdigit() for part in t.module.split("."))


def _also_wanted(
    tensors: Sequence[TensorRef], roles: Mapping[str, Verdict], recipe: Recipe, config: Mapping[str, Any]
) -> frozenset[str]:
    """Modules that the layout quantizes by default although they are no Linear layers of a block: the text model's
    embeddings, and its head where the config says that it is not tied. (Readers differ in what they take a config for
    that says nothing; a head in source precision suits them all.)"""
    layout, nontext = find_layout(recipe.layout), load_families().names.nontext
    return frozenset(
        t.module
        for t in tensors
        if roles[t.name].role.value in layout.also_roles
        and not any(part.isdigit() for part in t.module.split("."))
        and not nontext.search(t.module)
        and (roles[t.name].role is not Role.HEAD or says_tied(config) is False)
    )


def _decide_one(
    t: TensorRef,
    verdict: Verdict,
    recipe: Recipe,
    exact: Mapping[str, LayerRule],
    also: frozenset[str],
    policy: Mapping[str, str],
) -> Decision:
    def keep(rule: str) -> Decision:
        return Decision(t, verdict.role, rule, "copy", None)

    if not _is_weight(t) or verdict.role is Role.EXPERT_STACK:
        ignored = next((p for p in recipe.ignore if p.matches(t.module) or p.matches(t.name)), None)
        if verdict.role in (Role.UNKNOWN, Role.EXPERT_STACK) and ignored:
            return keep(f"ignore:{ignored.text}")
        if verdict.role is Role.EXPERT_STACK and t.shape is None:  # of an index: its experts cannot be counted
            return Decision(t, verdict.role, verdict.rule, "quantize", recipe.scheme)
        return keep(verdict.rule)
    named = exact.get(t.module)
    if named is None and (hit := _first(recipe.ignore, t.module)):
        return keep(f"ignore:{hit.text}")
    included = _first(recipe.include, t.module)
    held = policy.get(t.module) if verdict.role is Role.LINEAR else None
    wanted = (
        (verdict.role is Role.LINEAR and held is None)
        or t.module in also
        or (recipe.quant_lm_head and _is_head(t, verdict))
    )
    if not wanted and (named or included):
        if verdict.role not in MATRIX_ROLES:
            raise BadOption(
                f"{t.module} cannot be quantized: its role is {verdict.role.value} (rule {verdict.rule}); "
                "remove it from --include or --layer-config"
            )
        wanted = named is None or not named.keeps
    if not wanted:
        return keep(f"policy:{held}" if held else verdict.rule)
    if t.dtype is not None and t.dtype not in WEIGHT_DTYPES:
        raise UnsupportedSource(
            f"{t.name} in {t.shard} is {t.dtype}: expected one of {', '.join(WEIGHT_DTYPES)}; keep it with "
            f"--ignore {t.module}"
        )
    rule = named or next((r for r in recipe.layer_rules if r.pattern.matches(t.module)), None)
    rule = rule or next((r for r in recipe.preset_rules if r.pattern.matches(t.module)), None)
    if rule is None:
        return Decision(
            t,
            verdict.role,
            f"include:{included.text}" if included else verdict.rule,
            "quantize",
            recipe.scheme,
        )
    scheme = _apply(rule, recipe)
    if scheme is None:
        return keep(f"layer_config:{rule.pattern.text}")
    return Decision(t, verdict.role, f"layer_config:{rule.pattern.text}", "quantize", scheme)


def _apply(rule: LayerRule, recipe: Recipe) -> Scheme | None:
    """The default scheme changed by a rule; None when it says 16 bits."""
    if rule.keeps:
        return None
    base = parse_scheme(rule.scheme).scheme if rule.scheme else recipe.scheme
    return find_layout(recipe.layout).settle(change_scheme(base, rule.bits, rule.group_size, rule.sym))


def _first(patterns: Sequence[Pattern], module: str) -> Pattern | None:
    return next((p for p in patterns if p.matches(module)), None)


def _check_patterns(recipe: Recipe, modules: set[str], ignorable: set[str]) -> None:
    """Every pattern of the user must hit a module: a typo must not pass silently.

    `ignorable` are the modules, and the tensors that stop a plan unless they are ignored.
    """
    options = (
        ("--ignore", recipe.ignore, ignorable),
        ("--include", recipe.include, modules),
        ("--layer-config", tuple(r.pattern for r in recipe.layer_rules), modules),
    )
    for option, patterns, names in options:
        for p in patterns:
            if p.kind == "exact" and p.body in names:
                continue
            if not any(p.matches(n) for n in names):
                raise PatternMatchesNothing(
                    f"{option} {p.text!r} matches no module: a bare name is exact, `*` stands for one dotted segment, "
                    "`**` for any number, `re:` starts a regular expression; `shardq inspect` lists the modules"
                )


def _refuse_unknown(decisions: Sequence[Decision]) -> None:
    taken = [d for d in decisions if d.action != "drop" and not d.rule.startswith("ignore:")]
    unknown = [d.tensor.name for d in taken if d.role is Role.UNKNOWN]
    if unknown:
        raise UnknownTensor(
            f"{len(unknown)} tensors of unknown role: {_names(unknown)}; look at them with `shardq inspect`, and keep "
            "them in source precision with --ignore NAME if that is right"
        )


def _check_head(checkpoint: Checkpoint, recipe: Recipe, decisions: Sequence[Decision]) -> None:
    """What is asked for must be there; find_weights has made a head of an embedding that is also the head."""
    if recipe.quant_lm_head and not any(d.role is Role.HEAD and d.action == "quantize" for d in decisions):
        tied = says_tied(checkpoint.config or {})
        raise BadOption(
            f"--quant-lm-head: {checkpoint.label} has no head to quantize"
            + (f" (the head is the embedding, and none is called {' or '.join(HEADS)})" if tied else "")
        )


def _fit_layout(decisions: Sequence[Decision], recipe: Recipe) -> tuple[Decision, ...]:
    """Apply --ragged where the layout cannot hold a tensor. Raises BadGroupSize or LayoutRefuses with the list."""
    layout = find_layout(recipe.layout)
    fitted: list[Decision] = []
    refused: dict[str, list[Decision]] = {}
    for d in decisions:
        if d.scheme is None or d.tensor.shape is None:
            fitted.append(d)
            continue
        rows, columns = d.tensor.shape
        refusal = layout.refuse(d.scheme, recipe.scheme, rows, columns)
        if refusal is None:
            fitted.append(d)
            continue
        shrunk = _shrink(d.scheme, columns) if refusal.ragged and recipe.ragged == "shrink" else None
        if shrunk and layout.refuse(shrunk, recipe.scheme, rows, columns) is None:
            fitted.append(Decision(d.tensor, d.role, "ragged:shrink", "quantize", shrunk))
        elif recipe.ragged == "keep" and (refusal.ragged or rows % layout.slab_rows or columns % layout.slab_rows):
            fitted.append(Decision(d.tensor, d.role, "ragged:keep", "copy", None))
        else:
            refused.setdefault(refusal.reason if not refusal.ragged else "", []).append(d)
    for reason, ds in refused.items():
        if reason:
            raise LayoutRefuses(
                f"layout {layout.name} {reason}: {_listed(ds)}; keep them with --ragged keep or "
                "--ignore, or choose another --format"
            )
    if ragged := refused.get(""):
        raise BadGroupSize(_ragged_message(layout.name, ragged))
    return tuple(fitted)


def _shrink(scheme: Scheme, columns: int) -> Scheme | None:
    """`scheme` with the largest group that divides the columns and that loaders take."""
    sizes = (g for g in FITTING_GROUPS if g < scheme.group_size and columns % g == 0)
    size = next(sizes, None)
    return None if size is None else change_scheme(scheme, group_size=size)


def _ragged_message(layout: str, ragged: Sequence[Decision]) -> str:
    widths = {d.tensor.shape[1] for d in ragged if d.tensor.shape}
    fits = [str(g) for g in reversed(FITTING_GROUPS) if all(c % g == 0 for c in widths)]
    sizes = sorted({d.scheme.group_size for d in ragged if d.scheme})
    advice = f"--group-size {' or '.join(fits)} fits them all; or " if fits else ""
    return (
        f"group size {', '.join(map(str, sizes))} does not divide the columns of {_listed(ragged)}, and {layout} "
        f"cannot hold a short group: {advice}--ragged shrink (the largest group that fits, per module) or "
        "--ragged keep (source precision)"
    )


def _listed(ds: Sequence[Decision]) -> str:
    return f"{len(ds)} tensors: " + _names([f"{d.tensor.name} {list(d.tensor.shape or ())}" for d in ds])


def _names(names: Sequence[str]) -> str:
    shown = ", ".join(names[:SHOWN])
    return shown if len(names) <= SHOWN else f"{shown} and {len(names) - SHOWN} more"
