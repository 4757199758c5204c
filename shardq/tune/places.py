"""Where the matrices of a checkpoint lie among the parameters of a block, experts in stacks included: one by one in the
checkpoint and a stack in the model, or stacks in both, whichever way they lie."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch

from shardq.split_stacks import slice_module
from shardq.stacks import ExpertStack
from shardq.tune.blocks import BlockModel
from shardq.tune.conversions import Conversion
from shardq.tune.joining import Joint
from shardq.weights import is_turned, kept_shape

TURN: Final = {1, 2}  # axes of a stack that transformers' Transpose changes


@dataclass(frozen=True, slots=True)
class Place:
    """A matrix among the parameters of a block."""

    parameter: str  # its name in the block
    expert: int | None = None  # of a stack: its slice
    lines: range | None = None  # of a slice that is several matrices: its outputs among those of the slice
    turned: bool = False  # the slice is [inputs, outputs]

    def of(self, parameter: torch.Tensor) -> torch.Tensor:
        """The matrix, [outputs, inputs], as a view of the parameter."""
        part = parameter if self.expert is None else parameter[self.expert]
        rows = part.T if self.turned else part
        return rows if self.lines is None else rows[self.lines.start : self.lines.stop : self.lines.step]


def find_places(
    model: BlockModel, stacks: Mapping[str, ExpertStack], block: str, parameters: Sequence[str]
) -> Iterator[tuple[str, Place]]:
    """Tensors of a plan that are matrices of these parameters of a block, each with its place. `stacks`: those that the
    plan splits, by the names of their weights. What lies in no form that is known here is left out."""
    shapes = model.matched.shapes
    for c in model.matched.conversions.find(parameters):
        inner, shape = c.key.removeprefix(f"{block}."), shapes[c.key]
        first = c.sources[0][0]
        if len(shape) == 3 and len(c.parameters) == 1:
            if isinstance(c.converter, Joint):
                for p in c.converter.pieces:
                    yield p.tensor, Place(inner, p.expert, p.lines, p.transposed)
            elif first in stacks and len(c.sources) == 1:
                yield from _whole(model, c, stacks[first], inner)
            elif c.converter is not None:
                yield from _merged(model, c, inner)
        elif c.converter is None and len(shape) == 2 and model.matched.tensors[first].shape == shape:
            yield first, Place(inner)


def _whole(model: BlockModel, c: Conversion, stack: ExpertStack, inner: str) -> Iterator[tuple[str, Place]]:
    """Matrices of a stack that is one in the checkpoint, too."""
    t = model.matched.tensors[c.sources[0][0]]
    shape = model.matched.shapes[c.key]
    turned = stack.transposed ^ is_turned(t)
    for step in c.converter.operations if c.converter is not None else ():
        if type(step).__name__ != "Transpose" or {step.dim0, step.dim1} != TURN:
            return
        turned ^= not step.check_dims or kept_shape(t) != shape
    outputs, columns = sum(len(p.lines) for p in stack.parts), stack.columns or 0
    if shape != (stack.experts, *((columns, outputs) if turned else (outputs, columns))):
        return
    if stack.emit == "stacked":
        for expert in range(shape[0]):
            yield f"{slice_module(stack, expert)}.weight", Place(inner, expert, None, turned)
        return
    for m in stack.matrices():
        yield m.name, Place(inner, m.expert, m.lines, turned)


def _merged(model: BlockModel, c: Conversion, inner: str) -> Iterator[tuple[str, Place]]:
    """Matrices of experts that a stack [experts, rows, columns] is made of, one pattern of names below the other."""
    experts, rows, columns = model.matched.shapes[c.key]
    by_pattern: dict[str, list[str]] = {p: [] for p in c.converter.source_patterns}
    for tensor, pattern in c.sources:
        by_pattern[pattern].append(tensor)
    heights = [_height(model.matched.tensors, names, experts, columns) for names in by_pattern.values()]
    if None in heights or sum(h for h in heights if h) != rows:
        return  # turned or interleaved
    begin = 0
    for names, height in zip(by_pattern.values(), heights, strict=True):
        assert height is not None
        for expert, tensor in enumerate(names):
            yield tensor, Place(inner, expert, range(begin, begin + height))
        begin += height


def _height(tensors: Mapping[str, object], names: Sequence[str], experts: int, columns: int) -> int | None:
    """Rows of the matrices of one pattern; None where these are no matrices of all experts."""
    shapes = {getattr(tensors[n], "shape", None) for n in names}
    shape = shapes.pop() if len(shapes) == 1 else None
    if len(names) != experts or shape is None or len(shape) != 2 or shape[1] != columns:
        return None
    return int(shape[0])
