"""What encoded weights are made of, by the headers of their tensors: asks the reader of each kind."""

from collections.abc import Mapping, Sequence

from shardq.checkpoint import TensorRef
from shardq.companions import Companion
from shardq.dequantize.base import Encoded, Mismatch, Module, Wanted
from shardq.dequantize.finding import Found, Problem
from shardq.dequantize.hints import Hints
from shardq.dequantize.kinds import KINDS


def describe(
    modules: Mapping[str, Sequence[Companion]],
    refs: Mapping[str, TensorRef],
    hints: Hints,
    peeked: Mapping[str, bytes],
) -> Found:
    """The encoded weights of `modules`, the companions of each by name. What is dropped is left to the caller. `peeked`
    is as of find_encoded. Raises nothing."""
    encoded: dict[str, tuple[Encoded, ...]] = {}
    consumed: set[str] = set()
    wanted: list[TensorRef] = []
    unmeasured: list[str] = []
    problems: list[Problem] = []
    for name, members in modules.items():
        if any(refs[c.name].shape is None for c in members):
            unmeasured.append(name)
            continue
        found = _describe(name, members, refs, hints, peeked)
        if isinstance(found, Wanted):
            wanted.append(found.tensor)
        elif isinstance(found, Mismatch):
            problems.append(Problem(found.trait, found.tensor, refs[found.tensor].shard, found.reason))
        else:
            encoded[name] = found
            consumed.update(c.name for c in members)
    return Found(encoded, frozenset(consumed), {}, tuple(problems), tuple(wanted), tuple(unmeasured))


def _describe(
    name: str, members: Sequence[Companion], refs: Mapping[str, TensorRef], hints: Hints, peeked: Mapping[str, bytes]
) -> tuple[Encoded, ...] | Mismatch | Wanted:
    by_role: dict[str, TensorRef] = {}
    kind = next(c.kind for c in members if c.role == "codes")
    for c in members:
        if c.role in by_role or c.kind != kind:
            return Mismatch("leftover", c.name, f"is {c.role} of {name}, which has one already")
        by_role[c.role] = refs[c.name]
    return KINDS[kind].describe(Module(name, kind, by_role, hints, peeked))
