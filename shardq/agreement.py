"""One decision for all members of a fused group: what a server runs as one matrix has one scheme, or is kept whole."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from shardq.errors import FusedGroupSplit
from shardq.fused import fused_groups

if TYPE_CHECKING:
    from shardq.decide import Decision

SHOWN = 3  # groups listed in a message before "and N more"
OPTION_RULES = ("ignore:", "include:", "layer_config:")  # rules of a Decision that a user's option made


def agree(decisions: Sequence["Decision"], config: Mapping[str, Any] | None) -> tuple["Decision", ...]:
    """`decisions` with the members of every fused group alike.

    Members that differ only by what --ragged did, or by what the default rule keeps, are made alike: all kept, or all
    with the smallest of the groups' sizes. Raises FusedGroupSplit where the user's options make the difference.
    """
    matrices = {d.tensor.module: i for i, d in enumerate(decisions) if d.tensor.name.endswith(".weight")}
    evened = list(decisions)
    split: list[list[Decision]] = []
    for group in dict.fromkeys(fused_groups(matrices, config).values()):
        members = [evened[matrices[m]] for m in group]
        if len({d.scheme for d in members}) == 1:
            continue
        alike = _even(members)
        if alike is None:
            split.append(members)
            continue
        for d in alike:
            evened[matrices[d.tensor.module]] = d
    if split:
        raise FusedGroupSplit(_message(split))
    return tuple(evened)


def _even(members: Sequence["Decision"]) -> Sequence["Decision"] | None:
    """The members with one decision, or None where the options contradict each other."""
    kept = [d for d in members if d.scheme is None]
    if kept:
        if any(d.rule.startswith(OPTION_RULES) for d in kept):
            return None
        rule = "ragged:keep" if any(d.rule == "ragged:keep" for d in kept) else "fused"
        if rule == "fused" and any(d.rule.startswith(OPTION_RULES) for d in members):
            return None
        return [d if d.scheme is None else replace(d, rule=rule, action="copy", scheme=None) for d in members]
    schemes = [d.scheme for d in members if d.scheme]
    smallest = min(schemes, key=lambda s: s.group_size)
    shrunk = any(d.rule == "ragged:shrink" for d in members)
    if not shrunk or len({replace(s, group_size=smallest.group_size) for s in schemes}) > 1:
        return None
    return [d if d.scheme == smallest else replace(d, rule="ragged:shrink", scheme=smallest) for d in members]


def _message(split: Sequence[Sequence["Decision"]]) -> str:
    shown = "; ".join(_told(members) for members in split[:SHOWN])
    more = f"; and {len(split) - SHOWN} more" if len(split) > SHOWN else ""
    return (
        f"{len(split)} groups of modules that servers run as one matrix are split: {shown}{more}: give all members the "
        "same scheme with --layer-config, or name all of them to --ignore (or --include)"
    )


def _told(members: Sequence["Decision"]) -> str:
    parent = members[0].tensor.module.rpartition(".")[0]
    parts = (
        f"{d.tensor.module.rpartition('.')[2]} {d.scheme.name if d.scheme else 'kept'} ({d.rule})" for d in members
    )
    return f"{parent}: {', '.join(parts)}"
