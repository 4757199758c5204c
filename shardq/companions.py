"""Finds the tensors of a source that is quantized already: codes, and the scales beside them.

Detection looks at names, dtypes and shapes, never at the config: quantization configs are known to
be absent or wrong. The kinds and their suffixes are rows of families.toml.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Literal

from shardq.checkpoint import TensorRef
from shardq.families import Families, SourceKind, load_families
from shardq.formats import STORAGE

Part = Literal["codes", "parameter"]

_PACKED_DTYPES = frozenset({"I8", "U8", "I32", "U32"})
_CODES_LEAVES = ("qweight", "weight_packed", "_blocks")


@dataclass(frozen=True, slots=True)
class Companion:
    """A tensor that is part of a quantized weight."""

    name: str
    kind: str  # id of a source in families.toml, or `..._without_...` if nothing tells which
    part: Part  # the quantized elements themselves, or a scale, zero point, shape, ...
    weight: str  # name of the weight were it not quantized; the tensor's own name if unpaired
    paired: bool  # False: its partner is missing
    shape: tuple[int, ...] | None  # of codes: rows are right, columns may be packed; else None
    role: str = ""  # of a paired one: codes, scale, or a role of families.toml's companion_roles


def find_companions(tensors: Iterable[TensorRef]) -> tuple[Companion, ...]:
    """Every tensor that marks a quantized source, in the order given; empty for full precision.

    A name that has other uses (`.scale`, `.scales`, `.biases`) counts only beside a weight of a
    low-precision dtype. Low-precision weights without a scale, and scales without a weight, are
    returned with `paired` False. Where dtypes are None (an index without headers) only names that
    nothing else has are found. Raises nothing.
    """
    families = load_families()
    refs = {ref.name: ref for ref in tensors}
    kinds_of: dict[str | None, tuple[SourceKind, ...]] = {}
    found: dict[str, Companion] = {}
    for ref in refs.values():
        if ref.dtype not in kinds_of:
            kinds_of[ref.dtype] = _kinds_for(ref.dtype, families)
        for kind in kinds_of[ref.dtype]:
            if ref.name.endswith(kind.codes) and _fits(ref, kind, refs):
                _add(ref, kind, refs, found, families.companion_roles)
                break
    for ref in refs.values():
        if ref.name not in found:
            lone = _lone(ref, families)
            if lone is not None:
                found[ref.name] = lone
    return tuple(found[name] for name in refs if name in found)


def _kinds_for(dtype: str | None, families: Families) -> tuple[SourceKind, ...]:
    if dtype is None:
        return tuple(kind for kind in families.sources if kind.by_name)
    return tuple(kind for kind in families.sources if dtype in kind.dtypes)


def _fits(ref: TensorRef, kind: SourceKind, refs: Mapping[str, TensorRef]) -> bool:
    base = ref.name[: len(ref.name) - len(kind.codes)]
    scale = refs.get(base + kind.scale)
    if scale is None or not all(base + suffix in refs for suffix in kind.requires):
        return False
    if kind.ndim and ref.shape is not None and len(ref.shape) != kind.ndim:
        return False
    if kind.scale_dtypes and scale.dtype not in kind.scale_dtypes:
        return False
    return kind.grid == "any" or _grid_fits(ref.shape, scale.shape, kind)


def _grid_fits(codes: tuple[int, ...] | None, scale: tuple[int, ...] | None, kind: SourceKind) -> bool:
    if codes is None or scale is None or not codes:
        return False
    match kind.grid:
        case "scalar":
            return prod(scale) == 1
        case "row":
            return scale in ((codes[0], 1), (codes[0],))
        case "group32":
            return len(scale) == len(codes) and scale[-1] == -(-codes[-1] // 32)
        case "packed6":
            return len(scale) == len(codes) and scale[-1] == -(-codes[-1] // 24) and codes[-1] > 16 * scale[-1]
        case "awq":  # GPTQ packs rows and keeps the columns, AWQ packs columns
            return len(codes) == 2 and len(scale) == 2 and codes[1] != scale[1]
        case "any":
            return True


def _add(
    ref: TensorRef,
    kind: SourceKind,
    refs: Mapping[str, TensorRef],
    found: dict[str, Companion],
    roles: Mapping[str, str],
) -> None:
    base = ref.name[: len(ref.name) - len(kind.codes)]
    weight = f"{base}.weight" if kind.codes.startswith(".") else base
    shape = _row_shape(ref, kind)
    found[ref.name] = Companion(ref.name, kind.id, "codes", weight, paired=True, shape=shape, role="codes")
    for suffix in (kind.scale, *kind.requires, *kind.parts):
        name = base + suffix
        if name in refs:
            role = "scale" if suffix == kind.scale else roles[suffix]
            found[name] = Companion(name, kind.id, "parameter", weight, paired=True, shape=None, role=role)


def _row_shape(ref: TensorRef, kind: SourceKind) -> tuple[int, ...] | None:
    if ref.shape is None or kind.rows == "opaque":
        return None
    return ref.shape[:-1] if kind.rows == "blocks" else ref.shape


def _lone(ref: TensorRef, families: Families) -> Companion | None:
    """A tensor that only a quantized source has and whose partner is missing, else None."""
    leaf = ref.name.rpartition(".")[2]
    storage = STORAGE.get(ref.dtype) if ref.dtype is not None else None
    part: Part = "parameter"
    if leaf in families.lone:
        kind = families.lone[leaf]
        if leaf.endswith(_CODES_LEAVES):
            part = "codes"
    elif storage is None:
        return None
    elif storage.tag == "F8_E8M0":
        kind = "scale_without_weight"
    elif storage.floating and storage.bits <= 8:
        kind, part = "float_without_scale", "codes"
    elif leaf == "weight" and storage.tag in _PACKED_DTYPES and len(ref.shape or ()) >= 2:
        kind, part = "packed_without_scale", "codes"
    else:
        return None
    return Companion(ref.name, kind, part, ref.name, paired=False, shape=None)
