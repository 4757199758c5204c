"""Between a model and `mixture`: decisions -> items that share a scheme, and the choice -> a layer config that a user
reads, edits, and gives to --layer-config."""

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from shardq.errors import BadOption, FusedGroupSplit, LayoutRefuses
from shardq.files.safetensors import tensor_bytes
from shardq.formats import STORAGE
from shardq.fused import fused_groups
from shardq.layouts.base import Layout
from shardq.mixture import Item, Mixture, Option
from shardq.patterns import KEEP_BITS
from shardq.roles import Role
from shardq.schemes import PRESETS, Scheme, parse_scheme

if TYPE_CHECKING:
    from shardq.decide import Decision

KEPT: Final = Option("BF16", None)  # source precision, whatever its dtype
KEPT_KIND: Final = "kept"  # items that no rule is written for: they are kept by what else the recipe says
# All routed experts of a layer: servers look up one scheme for the container (vLLM's FusedMoE).
EXPERTS: Final = re.compile(r"((?:.*?\.)?(?:experts|switch_mlp|moe(?=\.\d+\.)))\..+")
KEPT_WORDS: Final = ("BF16", "F16", "FP16", "16BIT")
FIXED_ROLES: Final = frozenset({Role.HEAD, Role.EMBEDDING})
UNITS: Final = re.compile(r"(?<![^.])\d+(?![^.])")  # segments of a name that are numbers


@dataclass(frozen=True, slots=True)
class Matrix:
    """A tensor as a mixture sees it: what it would cost, and whether there is a choice."""

    module: str
    shape: tuple[int, ...]  # [rows, columns]; of what is kept any
    dtype: str  # safetensors tag
    fixed: Option | None = None  # no choice
    counted_only: bool = False  # kept by the recipe, and no rule of the file is about it


@dataclass(frozen=True, slots=True)
class Group:
    """Matrices that must share one option."""

    name: str
    kind: str
    matrices: tuple[Matrix, ...]  # in the order given
    fixed: Option | None


# --- what there is to choose -----------------------------------------------------------------


def parse_options(text: str, layout: Layout) -> tuple[Option, ...]:
    """Options from "W2A16G64,W4A16,W8A16", settled by the layout; BF16 keeps a matrix. Raises UnknownScheme, and
    BadOption for one that is given twice, for a preset that is a mixture itself, for a scale that depends on more than
    a group, and for fewer than two."""
    found = [_parse_option(word, layout) for word in text.split(",")]
    if twice := [name for name, count in Counter(o.name for o in found).items() if count > 1]:
        raise BadOption(f"--options {text!r}: {twice[0]} is given twice")
    if len(found) < 2:
        raise BadOption(f"--options {text!r}: expected two schemes or more, with commas between them")
    return tuple(found)


def _parse_option(word: str, layout: Layout) -> Option:
    if word.strip().upper() in KEPT_WORDS:
        return KEPT
    preset = parse_scheme(word)
    if preset.bits_of:
        raise BadOption(f"--options: {preset.name} is a mixture itself; name the schemes that it is made of")
    scheme = layout.settle(preset.scheme)
    if scheme.reach != "group":
        raise BadOption(
            f"--options: {scheme.name} has a scale beyond a group of columns and cannot be part of a mixture"
        )
    return make_option(scheme)


def make_option(scheme: Scheme | None) -> Option:
    """The option of a settled scheme, by the preset's name where it has one; None is what keeps a matrix."""
    if scheme is None:
        return KEPT
    return Option(next((p.name for p in PRESETS.values() if p.scheme.name == scheme.name), scheme.name), scheme)


def find_matrices(decisions: Iterable["Decision"], count_kept: bool = False) -> tuple[Matrix, ...]:
    """Matrices among the decisions of a plain recipe, in order: those quantized, and those that its layer config keeps.

    Fixed are heads and embeddings, modules with a rule of their own, and carried codes. With `count_kept` all other
    tensors that are written count towards the average too. Tensors of which only an index is known are left out.
    """
    return tuple(m for d in decisions if d.action != "drop" and (m := _matrix(d, count_kept)))


def find_kept(decisions: Iterable["Decision"]) -> tuple[str, ...]:
    """Modules that are kept only because another member of their fused group is: the file has to say so, for one of its
    globs may hit them, and an option that splits a group is refused."""
    return tuple(d.tensor.module for d in decisions if d.action == "copy" and d.rule == "fused")


def _matrix(d: "Decision", count_kept: bool) -> Matrix | None:
    t, ruled = d.tensor, d.rule.startswith("layer_config:")
    if t.shape is None or t.dtype is None or t.dtype not in STORAGE:
        return None
    if d.scheme is None:
        wanted = ruled or count_kept
        return Matrix(t.module if ruled else t.name, t.shape, t.dtype, KEPT, not ruled) if wanted else None
    fixed = ruled or d.carried or d.role in FIXED_ROLES
    return Matrix(t.module, t.shape, t.dtype, make_option(d.scheme) if fixed else None)


def group_matrices(
    matrices: Iterable[Matrix], config: Mapping[str, Any] | None, fuses: bool = True
) -> tuple[Group, ...]:
    """Matrices by what must share one option, in the order of the first of each: the routed experts of a layer, fused
    groups (where the layout's readers fuse), and the rest alone. Raises FusedGroupSplit where some of a group are
    fixed, and others are not or fixed otherwise."""
    everything = tuple(matrices)
    plain = [m.module for m in everything if not m.counted_only and not EXPERTS.fullmatch(m.module)]
    fused = fused_groups(plain, config) if fuses else {}
    members: dict[str, list[Matrix]] = {}
    for m in everything:
        expert = None if m.counted_only else EXPERTS.fullmatch(m.module)
        name = expert[1] if expert else _fused_name(fused[m.module]) if m.module in fused else m.module
        members.setdefault(name, []).append(m)
    return tuple(_group(name, ms) for name, ms in members.items())


def _fused_name(group: Sequence[str]) -> str:
    parent, dot, _ = group[0].rpartition(".")
    return parent + dot + "+".join(m.rpartition(".")[2] for m in group)


def _group(name: str, ms: Sequence[Matrix]) -> Group:
    fixed = {m.fixed for m in ms}
    if len(fixed) > 1:
        told = ", ".join(sorted(o.name if o else "free" for o in fixed))
        raise FusedGroupSplit(
            f"{name}: its {len(ms)} matrices must share one scheme, and the recipe asks for {told}: give all of them "
            "the same rule in --layer-config, or none"
        )
    kind = KEPT_KIND if ms[0].counted_only else name.rpartition(".")[2]
    return Group(name, kind, tuple(ms), ms[0].fixed)


# --- what it costs ---------------------------------------------------------------------------


def make_items(
    groups: Iterable[Group],
    options: Sequence[Option],
    damages: Mapping[str, Sequence[float]],
    layout: Layout,
    default: Scheme,
    ignore_scale_bits: bool = False,
) -> tuple[Item, ...]:
    """Items for `mixture.optimize`. `damages` holds module -> its damage under each of `options`, in their order
    (what the layout refuses may be NaN); those of a group are added. Fixed groups have no damage.

    Bits are those of the tensors that the layout writes, scales, zero points and padding included, or with
    `ignore_scale_bits` those of codes alone. An option that the layout refuses for a member, beside `default`, is not
    offered for its group. Raises LayoutRefuses for a group that no option is left for, and for an option that no group
    can have; BadOption where damages are missing.
    """

    shared, offers, items = tuple(options), dict[_Kinds, _Offer](), list[Item]()
    for g in groups:
        kinds = tuple(Counter((m.dtype, m.shape) for m in g.matrices).items())
        weights = sum(math.prod(shape) * n for (_, shape), n in kinds)
        modules = tuple(m.module for m in g.matrices)
        if g.fixed:
            bits = _group_bits(g.fixed, kinds, layout, ignore_scale_bits)
            items.append(Item(g.name, g.kind, modules, weights, (g.fixed,), (bits,), (0.0,)))
            continue
        if kinds not in offers:
            offers[kinds] = _find_offer(kinds, shared, layout, default, ignore_scale_bits)
        offer = offers[kinds]
        if not offer.options:
            raise LayoutRefuses(f"layout {layout.name} {offer.reasons[0]}: {g.name} can have none of the --options")
        harms = _add_damages(g, damages, offer.reasons)
        items.append(Item(g.name, g.kind, modules, weights, offer.options, offer.bits, harms))
    _check_offers(shared, tuple(offers.values()), layout)
    return tuple(items)


_Kinds = tuple[tuple[tuple[str, tuple[int, ...]], int], ...]  # dtype and shape of matrices, and how many there are


@dataclass(frozen=True, slots=True)
class _Offer:
    """What a group of such matrices can have."""

    options: tuple[Option, ...]
    bits: tuple[int, ...]
    reasons: tuple[str | None, ...]  # why the layout refuses each of the user's options; None: it does not


def _find_offer(
    kinds: _Kinds, options: tuple[Option, ...], layout: Layout, default: Scheme, ignore_scale_bits: bool
) -> _Offer:
    reasons = tuple(_refusal(o, kinds, layout, default) for o in options)
    held = tuple(o for o, reason in zip(options, reasons, strict=True) if reason is None)
    return _Offer(
        options if len(held) == len(options) else held,  # the same object for all: a million items share it
        tuple(_group_bits(o, kinds, layout, ignore_scale_bits) for o in held),
        reasons,
    )


def _refusal(option: Option, kinds: _Kinds, layout: Layout, default: Scheme) -> str | None:
    if option.scheme is None:
        return None
    found = (layout.refuse(option.scheme, default, *shape) for (_, shape), _ in kinds)
    return next((f.reason for f in found if f), None)


def _check_offers(options: Sequence[Option], offers: Sequence[_Offer], layout: Layout) -> None:
    for k, o in enumerate(options):
        if offers and all(x.reasons[k] for x in offers):
            raise LayoutRefuses(
                f"layout {layout.name} {offers[0].reasons[k]}: no module can have {o.name} of --options"
            )


def _group_bits(option: Option, kinds: _Kinds, layout: Layout, ignore_scale_bits: bool) -> int:
    return sum(option_bits(option, *kind, layout, ignore_scale_bits) * n for kind, n in kinds)


def option_bits(
    option: Option, dtype: str, shape: tuple[int, ...], layout: Layout, ignore_scale_bits: bool = False
) -> int:
    """Bits of a weight of that storage type and shape under an option."""
    if option.scheme is None:
        return math.prod(shape) * STORAGE[dtype].bits
    if ignore_scale_bits:
        return math.prod(shape) * option.scheme.bits
    rows, columns = shape
    return sum(8 * tensor_bytes(o.dtype, o.shape) for o in layout.outputs(option.scheme, dtype, rows, columns))


def _add_damages(g: Group, damages: Mapping[str, Sequence[float]], reasons: Sequence[str | None]) -> tuple[float, ...]:
    rows = [damages.get(m.module, ()) for m in g.matrices]
    for m, row in zip(g.matrices, rows, strict=True):
        if len(row) != len(reasons):
            raise BadOption(f"{m.module} has {len(row)} damages: expected one for each of the {len(reasons)} options")
    held = (k for k, reason in enumerate(reasons) if reason is None)
    return tuple(math.fsum(row[k] for row in rows) for k in held)  # exact, so that the order does not matter


# --- the file --------------------------------------------------------------------------------


def layer_config_text(
    items: Sequence[Item],
    mixture: Mixture,
    title: str = "",
    target_bits: float | None = None,
    scales: bool = True,
    kept: Iterable[str] = (),
    measured: str = "",
) -> str:
    """The choice as TOML for --layer-config: a rule for each kind of module that all layers agree on, and exceptions.

    The same decisions come back whatever the default scheme is, for every module of `items`; of what the recipe keeps
    only `kept` is named (see `find_kept`), so its --ignore and the like are to be given again. Comments say target,
    result and damage; `scales` says whether scale bits were counted, `measured` how damage was. Deterministic. Raises
    nothing.
    """
    ordered = sorted(items, key=lambda i: i.name)
    named = dict.fromkeys(kept, KEPT)
    named |= {m: mixture.choice[i.name] for i in ordered if i.kind != KEPT_KIND for m in i.modules}
    head = [f"# {line}".rstrip() for line in _header(ordered, mixture, title, target_bits, scales, measured)]
    body = [f"{_quoted(pattern)} = {_value(option)}" for pattern, option in compress(named).items()]
    return "\n".join([*head, "", *body, ""])


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")  # a basic string of TOML


def _value(option: Option) -> str:
    return f"{{ bits = {KEEP_BITS} }}" if option.scheme is None else _quoted(option.name)


def _header(
    items: Sequence[Item], mixture: Mixture, title: str, target_bits: float | None, scales: bool, measured: str
) -> Iterator[str]:
    target = f"target {target_bits:g}, " if target_bits is not None else ""
    proof = "no choice is better" if mixture.is_proven else f"another choice may be better by {mixture.gap:.1e} of it"
    yield f"Mixed precision{f' of {_plain(title)}' if title else ''}"
    yield (
        f"Bits for each weight: {target}this file {mixture.average_bits:.4f}, scales "
        f"{'included' if scales else 'not counted'}; {mixture.weights} weights"
    )
    yield f"Predicted damage: {mixture.damage:.6g}; {proof}"
    if measured:
        yield f"Measured: {_plain(measured)}"
    yield "The first pattern that fits a module counts, and an exact name before any; use with --layer-config"
    yield ""
    yield from _table(items, mixture)


def _table(items: Sequence[Item], mixture: Mixture) -> Iterator[str]:
    kinds: dict[str, list[tuple[Item, int]]] = {}
    for i in items:
        kinds.setdefault(i.kind, []).append((i, i.options.index(mixture.choice[i.name])))
    yield "| kind | items | bits for each weight | damage | options |"
    yield "| --- | --- | --- | --- | --- |"
    for kind, chosen in sorted(kinds.items()):
        weights, bits = sum(i.weights for i, _ in chosen), sum(i.bits[c] for i, c in chosen)
        counts = Counter(i.options[c].name for i, c in chosen)
        options = ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))
        damage = math.fsum(i.damages[c] for i, c in chosen)
        yield f"| {_plain(kind)} | {len(chosen)} | {bits / max(1, weights):.4f} | {damage:.6g} | {options} |"


def _plain(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text)


def compress(named: Mapping[str, Option]) -> dict[str, Option]:
    """Patterns, in order, that give each module its option when an exact name wins and else the first hit.

    Modules that differ only in numbers form a family, whose commonest option becomes a glob. Members with another
    option come before it: a glob over the last number where all that it hits agree, as the experts of a layer do, and
    names otherwise. A family of fewer numbers comes first, for a glob's `*` also hits words.
    """
    families: dict[str, dict[str, Option]] = {}
    odd: dict[str, Option] = {}
    for module in sorted(named, key=_natural):
        if _is_plain(module):
            families.setdefault(UNITS.sub("*", module), {})[module] = named[module]
        else:  # what would be read as something else than a name
            odd[f"re:{re.escape(module)}\\Z"] = named[module]
    rules = dict(odd)
    for family, members in sorted(families.items(), key=lambda f: (f[0].count("*"), _natural(next(iter(f[1]))))):
        rules |= _family_rules(family, members)
    return rules


def _family_rules(family: str, members: Mapping[str, Option]) -> dict[str, Option]:
    if len(members) == 1:
        return dict(members)
    counts = Counter(members.values())  # in the order of modules, so ties are the first's
    common = counts.most_common(1)[0][0]
    parts: dict[str, dict[str, Option]] = {}
    for module, option in members.items():
        parts.setdefault(_last_number(module), {})[module] = option
    rules: dict[str, Option] = {}
    for part, own in parts.items():
        others = {m: o for m, o in own.items() if o != common}
        first = next(iter(own.values()))
        agree = len(own) > 1 and part != family and len(set(own.values())) == 1
        rules |= {part: first} if agree and others else others
    return rules | {family: common}


def _last_number(module: str) -> str:
    *_, last = UNITS.finditer(module)
    return f"{module[: last.start()]}*{module[last.end() :]}"


def _natural(module: str) -> tuple[tuple[int, str], ...]:
    return tuple((int(s), "") if s.isdecimal() and s.isascii() else (-1, s) for s in module.split("."))


def _is_plain(module: str) -> bool:
    return not (any(c in module for c in "*?") or module.startswith("re:") or module.endswith(".weight"))
