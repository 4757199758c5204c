"""Where AWQ may scale: the sites of a fold (fold_sites.py, folds.toml) whose matrices all get codes in one block."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from shardq.decide import Decision
from shardq.errors import BadOption
from shardq.fold_sites import NormSite, PairSite, find_sites
from shardq.fused import model_types
from shardq.plans import Plan
from shardq.tune.blocks import BlockModel
from shardq.tune.places import Place
from shardq.tune.stored import STORED
from shardq.tune.subjects import Subject, Subjects, find_parameters


@dataclass(frozen=True, slots=True)
class Plain:
    """A tensor of the checkpoint that is a parameter of a block as it is."""

    tensor: str
    parameter: str  # its name in the block
    stored: torch.dtype  # in the checkpoint, and in the output


@dataclass(frozen=True, slots=True)
class Site:
    """Matrices with one input, whose columns may be scaled, and what it comes from: a norm, or the rows of a matrix."""

    behind: tuple[Subject, ...]
    norm: Plain | None = None
    adds: float = 0.0  # what the norm adds to its weights
    rows: Subject | None = None
    bias: Plain | None = None  # of the rows

    @property
    def parent(self) -> str:
        """The module of the block that has all of the matrices, which may be the only one itself."""
        names = [s.place.parameter.split(".")[:-1] for s in self.behind]
        same = 0
        while all(len(n) > same and n[same] == names[0][same] for n in names):
            same += 1
        return ".".join(names[0][:same])

    def module(self, block: nn.Module) -> nn.Module:
        """What has that name."""
        return block.get_submodule(self.parent)


def find_awq_sites(model: BlockModel, plan: Plan, subjects: Subjects) -> tuple[tuple[Site, ...], ...]:
    """The sites of each block. As auto-round 0.16.1, without those of routed experts, with a matrix that is kept, or
    where rows and columns do not belong together one by one (heads that share keys and values). Raises BadOption for a
    model without any, whose layers are then of no family that is known, or get no codes."""
    found = find_sites(plan.weights.tensors, model.checkpoint.config)
    decisions = {d.tensor.name: d for d in plan.decisions}
    blocks = tuple(
        tuple(_sites(found.norms, found.pairs, own, parameters, decisions))
        for own, parameters in zip(subjects.blocks, find_parameters(model), strict=True)
    )
    if not any(blocks):
        why = (
            found.left[0]
            if found.left
            else f"its model types: {', '.join(sorted(model_types(plan.checkpoint.config)))}"
        )
        raise BadOption(
            f"--algorithm awq: nothing of {model.checkpoint.label} is known that could be scaled ({why}): choose "
            "another algorithm"
        )
    return blocks


def _sites(
    norms: Sequence[NormSite],
    pairs: Sequence[PairSite],
    subjects: Sequence[Subject],
    parameters: Mapping[str, str],
    decisions: Mapping[str, Decision],
) -> Iterator[Site]:
    """Those of one block."""
    whole = {s.tensor: s for s in subjects if s.place == Place(s.place.parameter)}
    for n in norms:
        fed = (*n.also, *n.of)
        norm = plain_tensor(n.norm, parameters, decisions)
        if norm and all(name in whole for name in fed):
            yield Site(tuple(whole[name] for name in fed), norm=norm, adds=n.adds)
    for p in pairs:
        bias = plain_tensor(p.bias, parameters, decisions) if p.bias else None
        if p.rows in whole and p.columns in whole and isinstance(p.owners, range) and bool(p.bias) == bool(bias):
            yield Site((whole[p.columns],), rows=whole[p.rows], bias=bias)


def plain_tensor(tensor: str, parameters: Mapping[str, str], decisions: Mapping[str, Decision]) -> Plain | None:
    """None for what is not copied as it is."""
    d = decisions.get(tensor)
    stored = STORED.get(d.tensor.dtype or "") if d and d.action == "copy" and not d.tensor.encoded else None
    return Plain(tensor, parameters[tensor], stored) if stored and tensor in parameters else None
