"""Which matrices of a model's blocks a plan quantizes, and where each lies among the parameters of its block."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from shardq.plans import Plan
from shardq.schemes import Scheme
from shardq.tune.blocks import BlockModel

if TYPE_CHECKING:
    from shardq.tune.conversions import Conversion


@dataclass(frozen=True, slots=True)
class Place:
    """A matrix among the parameters of a block."""

    parameter: str  # its name in the block
    expert: int | None = None  # of a stack: its slice
    rows: tuple[int, int] | None = None  # of a slice that is several matrices

    def of(self, whole: torch.Tensor) -> torch.Tensor:
        """The matrix, [rows, columns], as a view of a tensor like the parameter."""
        part = whole if self.expert is None else whole[self.expert]
        return part if self.rows is None else part[slice(*self.rows)]


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
    left: tuple[str, ...]  # modules that get codes, but by no tuning: outside of blocks, or of a form that is not known


def find_subjects(model: BlockModel, plan: Plan) -> Subjects:
    """The matrices that a plan quantizes, without those whose codes it carries."""
    wanted = {d.tensor.name: d for d in plan.decisions if d.scheme is not None and d.goal is None}
    blocks: list[tuple[Subject, ...]] = []
    found: set[str] = set()
    for name, parameters in zip(model.block_names, model.matched.blocks, strict=True):
        own: list[Subject] = []
        for tensor, place in _places(model, name, parameters):
            d = wanted.get(tensor)
            if d is None or d.scheme is None or d.tensor.shape is None or d.tensor.dtype is None:
                continue
            rows, columns = d.tensor.shape
            reach = plan.reaches.get(tensor, (tensor,)) if d.scheme.reach != "group" else ()
            whole = tuple(dict.fromkeys((tensor, *reach))) if reach else ()
            subject = Subject(tensor, d.tensor.module, (rows, columns), d.tensor.dtype, d.scheme, whole, place)
            found.add(tensor)
            own.append(subject)
        blocks.append(tuple(own))
    return Subjects(tuple(blocks), tuple(d.tensor.module for n, d in wanted.items() if n not in found))


def _places(model: BlockModel, block: str, parameters: Sequence[str]) -> Iterator[tuple[str, Place]]:
    """Tensors of the checkpoint that are matrices of these parameters, each with its place."""
    shapes = model.matched.shapes
    for c in model.matched.conversions.find(parameters):
        if c.converter is None:
            ((tensor, _),) = c.sources
            inner = c.key.removeprefix(f"{block}.")
            if model.matched.tensors[tensor].shape == shapes[c.key] and len(shapes[c.key]) == 2:
                yield tensor, Place(inner)
        elif len(c.parameters) == 1 and len(shapes[c.key]) == 3:
            yield from _slices(model, block, c)


def _slices(model: BlockModel, block: str, c: "Conversion") -> Iterator[tuple[str, Place]]:
    """Matrices of experts that a stack [experts, rows, columns] is made of, one pattern of names below the other."""
    experts, rows, columns = model.matched.shapes[c.key]
    by_pattern: dict[str, list[str]] = {p: [] for p in c.converter.source_patterns}
    for tensor, pattern in c.sources:
        by_pattern[pattern].append(tensor)
    heights = [_height(model.matched.tensors, names, experts, columns) for names in by_pattern.values()]
    if None in heights or sum(h for h in heights if h) != rows:
        return  # turned, interleaved, or stacks in the checkpoint itself
    begin = 0
    for names, height in zip(by_pattern.values(), heights, strict=True):
        assert height is not None
        for expert, tensor in enumerate(names):
            yield tensor, Place(c.key.removeprefix(f"{block}."), expert, (begin, begin + height))
        begin += height


def _height(tensors: Mapping[str, object], names: Sequence[str], experts: int, columns: int) -> int | None:
    """Rows of the matrices of one pattern; None where these are no matrices of all experts."""
    shapes = {getattr(tensors[n], "shape", None) for n in names}
    shape = shapes.pop() if len(shapes) == 1 else None
    if len(names) != experts or shape is None or len(shape) != 2 or shape[1] != columns:
        return None
    return int(shape[0])
