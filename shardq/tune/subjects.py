"""Which matrices of a model's blocks a plan quantizes, and where each lies among the parameters of its block."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import torch
from torch import nn

from shardq.errors import BadOption
from shardq.layouts.input_scales import wants_input_scale
from shardq.plans import Plan
from shardq.schemes import Scheme
from shardq.tune.blocks import BlockModel
from shardq.tune.matching import head_tensor
from shardq.tune.places import Place, find_places

if TYPE_CHECKING:
    from shardq.decide import Decision

WEIGHT: Final = "weight"  # of a head
SHOWN: Final = 4  # modules told in a message


@dataclass(frozen=True, slots=True)
class Subject:
    """A matrix that gets codes."""

    tensor: str  # of the checkpoint
    module: str
    shape: tuple[int, int]
    dtype: str  # of the weight in the checkpoint, for scales of that type
    scheme: Scheme
    reach: tuple[str, ...]  # tensors whose largest magnitudes its scales depend on, itself included; empty: a group's
    place: Place

    def weight(self, block: nn.Module) -> torch.Tensor:
        """The matrix, [rows, columns], as a view of the block's parameter."""
        return self.place.of(block.get_parameter(self.place.parameter))


@dataclass(frozen=True, slots=True)
class Subjects:
    """Of a whole model."""

    blocks: tuple[tuple[Subject, ...], ...]  # of each block, in the order of its parameters
    head: Subject | None  # the output projection, if it gets codes; its place is in that module
    left: tuple[str, ...]  # modules that get codes, but by no tuning: outside of blocks, or of a form that is not known

    def all(self) -> Iterator[Subject]:
        """Of blocks and head."""
        yield from (s for own in self.blocks for s in own)
        if self.head:
            yield self.head


def find_subjects(model: BlockModel, plan: Plan) -> Subjects:
    """The matrices that a plan quantizes, without those whose codes it carries."""
    wanted = {d.tensor.name: d for d in plan.decisions if d.scheme is not None and d.goal is None}
    stacks = {name: s for s in plan.weights.stacks for name in (s.tensor, s.weight)}
    blocks: list[tuple[Subject, ...]] = []
    found: set[str] = set()
    for name, parameters in zip(model.block_names, model.matched.blocks, strict=True):
        places = find_places(model, stacks, name, parameters)
        own = tuple(_subject(plan, wanted[tensor], place) for tensor, place in places if tensor in wanted)
        found.update(s.tensor for s in own)
        blocks.append(own)
    head = _find_head(model, plan, wanted)
    found |= {head.tensor} if head else set()
    return Subjects(tuple(blocks), head, tuple(d.tensor.module for n, d in wanted.items() if n not in found))


def check_left(subjects: Subjects, plan: Plan) -> None:
    """Raises BadOption for modules that no tuning reaches and that want a scale of their activations."""
    left = frozenset(subjects.left)
    layout = plan.layout
    lacking = [
        d.tensor.module
        for d in plan.decisions
        if d.scheme and d.tensor.module in left and wants_input_scale(layout, d.scheme)
    ]
    if lacking:
        raise BadOption(
            f"scales of activations are found in blocks, for matrices of a known form, and {len(lacking)} modules are "
            f"none: {', '.join(lacking[:SHOWN])}; keep them with --ignore"
        )


def find_parameters(model: BlockModel) -> tuple[Mapping[str, str], ...]:
    """Of each block the tensors of the checkpoint that are parameters as they are, and the names of these in it."""
    found: list[Mapping[str, str]] = []
    for name, parameters in zip(model.block_names, model.matched.blocks, strict=True):
        plain = (c for c in model.matched.conversions.find(parameters) if c.converter is None)
        own = {c.sources[0][0]: c.key for c in plain}
        alike = {t: key for t, key in own.items() if model.matched.tensors[t].shape == model.matched.shapes[key]}
        found.append({t: key.removeprefix(f"{name}.") for t, key in alike.items()})
    return tuple(found)


def _subject(plan: Plan, d: "Decision", place: Place) -> Subject:
    tensor, scheme = d.tensor, d.scheme
    assert scheme is not None
    assert tensor.shape is not None
    assert tensor.dtype is not None
    rows, columns = tensor.shape
    reach = plan.reaches.get(tensor.name, (tensor.name,)) if scheme.reach != "group" else ()
    whole = tuple(dict.fromkeys((tensor.name, *reach))) if reach else ()
    return Subject(tensor.name, tensor.module, (rows, columns), tensor.dtype, scheme, whole, place)


def _find_head(model: BlockModel, plan: Plan, wanted: "Mapping[str, Decision]") -> Subject | None:
    """A head that is a Linear layer with the weight that the plan has under its name."""
    name = head_tensor(model.matched, model.checkpoint.config)
    module, d = model.head_module, wanted.get(name or "")
    if d is None or not isinstance(module, nn.Linear) or tuple(module.weight.shape) != d.tensor.shape:
        return None
    return _subject(plan, d, Place(WEIGHT))
