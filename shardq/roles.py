"""Tells what every tensor is, from names, shapes, dtypes and config.json alone: the default rule.

The tests run in a fixed order and the first hit decides; their data is in families.toml. None of
the tensors that they pick in the model types of transformers 5.23 is anything but a Linear. They
rather keep too much than too little: what is not a Linear-like matrix inside a numbered block stays
as it is, and a three-dimensional tensor that nobody knows gets the role UNKNOWN: a plan must stop.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from fnmatch import fnmatchcase
from typing import Any

from shardq.checkpoint import TensorRef
from shardq.companions import Companion, find_companions
from shardq.families import ConfigKeys, Families, Family, load_families
from shardq.formats import STORAGE


class Role(StrEnum):
    """What a tensor is. Only LINEAR and EXPERT_STACK are quantized by default."""

    LINEAR = "linear"  # weight [out, in] of a Linear inside a block
    EXPERT_STACK = "expert_stack"  # weights of all experts of a layer, [experts, rows, columns]
    HEAD = "head"  # output projection onto the vocabulary or onto classes
    EMBEDDING = "embedding"  # table that is looked up: tokens, positions, types
    ROUTER = "router"  # chooses experts
    NORM = "norm"  # weight or bias of a normalisation
    CONV = "conv"  # convolution kernel, or anything of four and more dimensions
    MTP = "mtp"  # of a multi-token prediction (next-token draft) layer
    NONTEXT = "nontext"  # of a vision, audio or projector part
    OUTSIDE_BLOCK = "outside_block"  # Linear-like, but in no numbered block: poolers, ...
    SMALL = "small"  # Linear, but small and known or likely to be sensitive
    VECTOR = "vector"  # at most one dimension: biases, gains, scalars
    BUFFER = "buffer"  # raw parameter that is no module's `weight`; integers and booleans
    TRANSPOSED = "transposed"  # weight [in, out] of a Conv1D: groups along its rows would be wrong
    COMPANION = "companion"  # scale, zero point, ... of a weight that the source has quantized
    UNKNOWN = "unknown"  # cannot be told; it would be wrong to guess


@dataclass(frozen=True, slots=True)
class Verdict:
    """A role, and the short id of the test that decided."""

    role: Role
    rule: str


@dataclass(frozen=True, slots=True)
class _Facts:
    """What the config and the whole list of tensors say."""

    vocab_sizes: frozenset[int]
    expert_counts: frozenset[int]
    layers: int | None  # layers of the text model; a higher layer index is a prediction layer
    family: Family | None
    block: re.Pattern[str]
    nontext: re.Pattern[str]
    only: re.Pattern[str] | None  # of the family, where some tensor has it: what has not is another part
    taken: frozenset[Role]  # parts of which Linear layers are taken as those of the text model are


@dataclass(frozen=True, slots=True)
class _Subject:
    """One tensor as the tests see it."""

    name: str
    module: str  # `a.b` of `a.b.weight`
    leaf: str  # `weight`
    seg: str  # `b`
    parent: str  # `a`
    shape: tuple[int, ...] | None
    numeric: bool  # a real-valued dtype, or codes of one, or a dtype that is not known
    beyond: bool  # its layer index is not below the number of layers


def assign_roles(
    tensors: Iterable[TensorRef], config: Mapping[str, Any] | None, taken: frozenset[Role] = frozenset()
) -> dict[str, Verdict]:
    """Role of every tensor, in the order given. `taken` may hold MTP and NONTEXT: Linear layers and expert stacks of
    these parts are then LINEAR and EXPERT_STACK too, with the part's rule.

    Where shape or dtype is None (an index without headers) the tests on sizes and dtypes are
    skipped, and a `.weight` counts as two-dimensional. Codes of a quantized source get the role of
    the weight that they stand for, or UNKNOWN if their scale is missing. Values of the config that
    have an unexpected type are ignored. Raises nothing.
    """
    families = load_families()
    refs = tuple(tensors)
    facts = _read_facts(config, refs, families, taken)
    companions = {c.name: c for c in find_companions(refs)}
    numbers = re.compile(r"(?<![^.])\d+(?![^.])")
    decided: dict[tuple[str, tuple[int, ...] | None, bool, bool], Verdict] = {}
    verdicts: dict[str, Verdict] = {}
    for ref in refs:
        companion = companions.get(ref.name)
        if companion is not None and (companion.part == "parameter" or not companion.paired):
            verdicts[ref.name] = _companion_verdict(companion)
            continue
        subject = _subject(ref, companion, facts, families)
        # Tests look at digits only as "a number", so all layers share one verdict.
        key = (numbers.sub("#", subject.name), subject.shape, subject.numeric, subject.beyond)
        if key not in decided:
            decided[key] = _decide(subject, facts, families)
        verdicts[ref.name] = decided[key]
    return verdicts


def _companion_verdict(companion: Companion) -> Verdict:
    if companion.part == "parameter":
        return Verdict(Role.COMPANION, f"source:{companion.kind}")
    return Verdict(Role.UNKNOWN, "dtype")


def _subject(ref: TensorRef, codes: Companion | None, facts: _Facts, families: Families) -> _Subject:
    name = codes.weight if codes is not None else ref.name
    shape = codes.shape if codes is not None else ref.shape
    module, _, leaf = name.rpartition(".")
    parent, _, seg = module.rpartition(".")
    storage = STORAGE.get(ref.dtype) if ref.dtype is not None else None
    numeric = codes is not None or storage is None or storage.floating
    layer = families.names.layer_index.search(module) if facts.layers is not None else None
    beyond = layer is not None and facts.layers is not None and int(layer[1]) >= facts.layers
    return _Subject(name, module, leaf, seg, parent, shape, numeric, beyond)


def prediction_tensors(tensors: Iterable[TensorRef], config: Mapping[str, Any] | None) -> frozenset[str]:
    """Names of all tensors of multi-token prediction layers, whatever their role: matrices, norms, the layers' own
    copies of embedding and head, scales of a quantized source. Raises nothing."""
    families = load_families()
    refs = tuple(tensors)
    facts = _read_facts(config, refs, families, frozenset())
    parts = ((ref, _decide_extra_part(_subject(ref, None, facts, families), facts, families)) for ref in refs)
    return frozenset(ref.name for ref, part in parts if part is not None and part.role is Role.MTP)


def may_be_linear(tensor: TensorRef, role: Role) -> bool:
    """True if a loader may have a tensor as the weight of a Linear layer, or as experts, whatever its role says.

    A Linear may have as many rows as the vocabulary, or be called `conv_out` or `patch_embedding`: of what looks like
    a table or a convolution only names that no Linear has tell. None of the Linear layers in the model types of
    transformers 5.23 is missed. Raises nothing.
    """
    if role is Role.EXPERT_STACK:
        return True
    if not tensor.name.endswith(".weight") or role in (Role.NORM, Role.VECTOR):
        return False
    if role not in (Role.EMBEDDING, Role.CONV, Role.BUFFER, Role.UNKNOWN):
        return True
    named_table = tensor.module.rpartition(".")[2] in load_families().names.tables
    return not named_table and (tensor.shape is None or len(tensor.shape) == 2)


# --- the tests, in order ---------------------------------------------------------------------


def _decide(subject: _Subject, facts: _Facts, families: Families) -> Verdict:
    if not subject.numeric:
        return Verdict(Role.BUFFER, "dtype")
    ndim = None if subject.shape is None else len(subject.shape)
    if ndim is not None and ndim <= 1:
        is_norm = families.names.norm.search(subject.seg) is not None
        return Verdict(Role.NORM if is_norm else Role.VECTOR, "ndim")
    if ndim is not None and ndim >= 4:
        return Verdict(Role.CONV, "ndim")
    if ndim == 3 or (ndim is None and families.experts.is_stack(subject.name, None)):
        return _decide_3d(subject, facts, families)
    if subject.leaf != "weight":
        return Verdict(Role.BUFFER if subject.leaf != "bias" else Role.VECTOR, "leaf")
    by_segment = _decide_by_segment(subject, facts, families)
    if by_segment is not None:
        return by_segment
    part = _decide_extra_part(subject, facts, families)
    if part is not None and part.role not in facts.taken:
        return part
    verdict = _decide_linear(subject, facts, families)
    if part is None:
        return verdict
    return Verdict(Role.LINEAR, part.rule) if verdict.role is Role.LINEAR else part


def _decide_3d(subject: _Subject, facts: _Facts, families: Families) -> Verdict:
    part = _decide_extra_part(subject, facts, families)
    if part is not None:
        stacked = part.role in facts.taken and families.experts.split(subject.name) is not None
        return Verdict(Role.EXPERT_STACK, part.rule) if stacked else part
    if families.experts.split(subject.name) is not None:
        return Verdict(Role.EXPERT_STACK, "experts")
    for known in families.keep_3d:
        if known.pattern.search(subject.name):
            return Verdict(Role(known.role), f"keep_3d:{known.id}")
    if subject.shape is not None and 1 in subject.shape:
        return Verdict(Role.CONV, "unit_dim")  # depthwise or pointwise kernel, per-channel gain
    return Verdict(Role.UNKNOWN, "ndim")


def _decide_by_segment(subject: _Subject, facts: _Facts, families: Families) -> Verdict | None:
    names, seg = families.names, subject.seg
    rows = None if subject.shape is None else subject.shape[0]
    if seg in names.head:
        return Verdict(Role.HEAD, "head")
    # A projection in a block may have as many rows as a small vocabulary; its name tells.
    in_block_projection = facts.block.search(subject.module) and names.projection.search(seg)
    if rows in facts.vocab_sizes and not in_block_projection:
        return Verdict(Role.HEAD if seg in names.vocab_head else Role.EMBEDDING, "vocab")
    if names.embed.search(subject.parent.rpartition(".")[2] if seg.isdigit() else seg):
        return Verdict(Role.EMBEDDING, "embed")
    if names.norm.search(seg):
        return Verdict(Role.NORM, "norm")
    if names.conv.search(seg):
        return Verdict(Role.CONV, "conv")
    if names.router.search(subject.module):
        return Verdict(Role.ROUTER, "router")
    # Rows alone would hit DeepSeek-V4's `indexer.compressor.wkv` [256, 4096] with 256 experts.
    in_moe = names.moe_parent.search(subject.parent) and not names.projection.search(seg)
    if rows in facts.expert_counts and in_moe:
        return Verdict(Role.ROUTER, "router_shape")
    return None


def _decide_extra_part(subject: _Subject, facts: _Facts, families: Families) -> Verdict | None:
    if families.names.mtp.search(subject.module):
        return Verdict(Role.MTP, "mtp")
    # Before the layer index: a vision tower counts its own layers.
    if facts.nontext.search(subject.module):
        return Verdict(Role.NONTEXT, "nontext")
    if facts.family is not None and facts.only is not None and not facts.only.search(subject.module):
        return Verdict(Role.NONTEXT, f"family:{facts.family.id}")
    if subject.beyond:
        return Verdict(Role.MTP, "mtp_index")
    return None


def _decide_linear(subject: _Subject, facts: _Facts, families: Families) -> Verdict:
    names = families.names
    if not facts.block.search(subject.module):
        return Verdict(Role.OUTSIDE_BLOCK, "noblock")
    if facts.family is not None and any(p.search(subject.module) for p in facts.family.keep):
        return Verdict(Role.SMALL, f"family:{facts.family.id}")
    if names.small.search(subject.module):
        return Verdict(Role.SMALL, "small")
    if subject.shape is not None:
        side = min(subject.shape)
        if side <= names.gate_like_max and names.gate_like.search(subject.module):
            return Verdict(Role.SMALL, "small")
        if side < names.min_dim:
            return Verdict(Role.SMALL, "min_dim")
    if facts.family is not None and subject.seg in facts.family.transposed:
        return Verdict(Role.TRANSPOSED, f"family:{facts.family.id}")
    return Verdict(Role.LINEAR, "default")


# --- facts -----------------------------------------------------------------------------------


def _read_facts(
    config: Mapping[str, Any] | None, refs: tuple[TensorRef, ...], families: Families, taken: frozenset[Role]
) -> _Facts:
    vocab_sizes: set[int] = set()
    expert_counts: set[int] = set()
    model_types: set[str] = set()
    layers: dict[tuple[str, ...], int] = {}  # place in the config -> number of layers
    keys = families.config
    waiting: list[tuple[tuple[str, ...], Mapping[str, Any]]] = [((), config or {})]
    while waiting:
        place, table = waiting.pop()
        for key, value in table.items():
            if isinstance(value, Mapping):
                waiting.append(((*place, str(key)), value))
            elif key == "model_type" and isinstance(value, str):
                model_types.add(value)
            elif _is_count(value):
                if keys.vocab_size.search(key):
                    vocab_sizes.add(value)
                elif key in keys.expert_count:
                    expert_counts.add(value)
                elif key in keys.layer_count:
                    layers[place] = max(value, layers.get(place, 0))
    family = _find_family(model_types, "_class_name" in (config or {}), refs, families)
    only = family.only if family is not None else None
    return _Facts(
        vocab_sizes=frozenset(vocab_sizes),
        expert_counts=frozenset(expert_counts),
        layers=_text_layers(layers, keys, families),
        family=family,
        block=family.block if family is not None and family.block is not None else families.names.block,
        nontext=family.nontext if family is not None and family.nontext is not None else families.names.nontext,
        only=only if only is not None and any(only.search(ref.module) for ref in refs) else None,
        taken=taken,
    )


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _text_layers(layers: Mapping[tuple[str, ...], int], keys: ConfigKeys, families: Families) -> int | None:
    """Layers of the text model: by its own config, else the top level, else the most elsewhere."""
    for place, count in layers.items():
        if place and place[-1] in keys.text and not _is_nontext_place(place, families):
            return count
    if () in layers:
        return layers[()]
    return max((n for place, n in layers.items() if not _is_nontext_place(place, families)), default=None)


def _is_nontext_place(place: tuple[str, ...], families: Families) -> bool:
    return any(families.names.nontext.search(key.removesuffix("_config")) for key in place)


def _find_family(
    model_types: set[str], diffusers: bool, refs: tuple[TensorRef, ...], families: Families
) -> Family | None:
    for family in families.families:
        named = any(fnmatchcase(t, pattern) for t in model_types for pattern in family.model_types)
        told_by_names = family.wide or family.probe
        if named or (family.diffusers and diffusers) or (told_by_names and any(_tells(r, family) for r in refs)):
            return family
    return None


def _tells(ref: TensorRef, family: Family) -> bool:
    return (bool(family.wide) and _is_wide(ref, family)) or (
        family.probe is not None and family.probe.search(ref.name) is not None
    )


def _is_wide(ref: TensorRef, family: Family) -> bool:
    if ref.shape is None or len(ref.shape) != 2 or ref.shape[1] <= ref.shape[0]:
        return False
    return ref.name.endswith(".weight") and ref.module.rpartition(".")[2] in family.wide
