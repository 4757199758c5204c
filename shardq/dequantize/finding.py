"""Finds all encoded weights of a checkpoint, by headers alone, and accounts for every tensor that belongs to one."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from shardq.checkpoint import TensorRef
from shardq.companions import Companion, find_companions
from shardq.dequantize.hints import Hints, read_hints
from shardq.families import RefusedSource, load_families

if TYPE_CHECKING:
    from shardq.dequantize.base import Encoded, Trait

REASONS: Final[Mapping[str, str]] = {
    "activation": "a scale of quantized activations, which the result does not have",
    "kv_cache": "a scale of a quantized key-value cache, which the result does not declare",
}


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that stops a run before a weight is read."""

    trait: "Trait"
    tensor: str  # empty where the configuration is meant
    shard: str
    reason: str  # what is wrong, expected and found

    def __str__(self) -> str:
        place = f"{self.tensor} in {self.shard} " if self.tensor else ""
        return f"{place}{self.reason}"


@dataclass(frozen=True, slots=True)
class Found:
    """What a checkpoint has encoded. Without problems and without `wanted`, `consumed` and the keys of `dropped` are
    all tensors that belong to encoded weights."""

    encoded: "Mapping[str, tuple[Encoded, ...]]"  # by name of the weight: one matrix, or the slices of a stack
    consumed: frozenset[str]  # source tensors that the weights are made of, or that say their shape
    dropped: Mapping[str, str]  # source tensors that stay behind, with the reason
    problems: tuple[Problem, ...]
    wanted: tuple[TensorRef, ...]  # small tensors whose content must be passed as `peeked` first
    unmeasured: tuple[str, ...] = ()  # weights that are known by an index alone: their headers are needed
    companions: tuple[Companion, ...] = ()  # all that mark a quantized source, by the way


def find_encoded(
    tensors: Iterable[TensorRef], config: Mapping[str, Any] | None, peeked: Mapping[str, bytes] | None = None
) -> Found:
    """All encoded weights. Shapes and dtypes decide; the configuration settles what they leave open (the bits of MLX,
    the version of GPTQ). Some kinds keep their shape in the content of a small tensor: these are returned as `wanted`,
    and the call is repeated with the content of all of them in `peeked`. Pure; raises nothing.
    """
    refs = {t.name: t for t in tensors}
    hints = read_hints(config)
    if (refusal := _refused(refs, hints)) is not None:
        return Found({}, frozenset(), {}, (refusal,), ())
    companions = find_companions(refs.values())
    modules: dict[str, list[Companion]] = {}
    problems: list[Problem] = []
    dropped: dict[str, str] = {}
    reasons = load_families().dropped
    for c in companions:
        if c.paired and c.role == "activation":
            dropped[c.name] = REASONS["activation"]
        elif c.paired:
            modules.setdefault(c.weight, []).append(c)
        elif c.name.rpartition(".")[2] not in reasons:
            problems.append(_unpaired(c, refs[c.name]))
    found = Found({}, frozenset(), {}, (), ())
    if modules:
        from shardq.dequantize.describing import describe  # with the readers of all kinds

        found = describe(modules, refs, hints, peeked or {})
    if companions:
        for ref in refs.values():
            reason = reasons.get(ref.name.rpartition(".")[2])
            if reason and ref.name not in found.consumed and _stays_behind(ref, reason, refs):
                dropped.setdefault(ref.name, REASONS[reason])
    return replace(found, dropped=dropped, problems=(*problems, *found.problems), companions=companions)


def _unpaired(c: Companion, ref: TensorRef) -> Problem:
    what = f"{ref.dtype} {list(ref.shape or ())}"
    if c.part == "codes":
        return Problem("unpaired", c.name, ref.shard, f"is a quantized weight ({what}, {c.kind}) without its scales")
    return Problem("leftover", c.name, ref.shard, f"belongs to a quantized weight ({what}, {c.kind}) that is not there")


def _refused(refs: Mapping[str, TensorRef], hints: Hints) -> Problem | None:
    words = {hints.method, str(hints.block.get("format", "")), str(hints.block.get("checkpoint_format", ""))}
    rows = load_families().refused
    for row in rows:
        if words & row.methods:
            return _refusal(row, None)
    firsts = {row.leaves[0]: row for row in rows if row.leaves}
    for ref in refs.values():
        base, _, leaf = ref.name.rpartition(".")
        if (found := firsts.get(leaf)) is not None and all(f"{base}.{x}" in refs for x in found.leaves):
            return _refusal(found, ref)
    return None


def _refusal(row: RefusedSource, ref: TensorRef | None) -> Problem:
    what = f"is of {row.id}" if ref else f"the source is quantized with {row.id}"
    reason = f"{what}, which is not read: start from the unquantized checkpoint, or from another quantization of it"
    return Problem("refused", ref.name if ref else "", ref.shard if ref else "", reason)


def _stays_behind(ref: TensorRef, reason: str, refs: Mapping[str, TensorRef]) -> bool:
    """One number beside a weight, or of a cache: never a learned vector that merely has such a name (`q_scale`)."""
    base = ref.name.rpartition(".")[0]
    return (ref.shape is None or ref.numel == 1) and (
        reason == "kv_cache" or any(f"{base}.{leaf}" in refs for leaf in ("weight", "weight_packed", "qweight"))
    )
