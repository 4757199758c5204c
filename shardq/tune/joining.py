"""Experts that a checkpoint has one by one, and a model of transformers as stacks, where transformers itself converts
nothing: outputs of shardq and of other quantizers, which split the stacks of gpt-oss and of others."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from shardq.checkpoint import TensorRef
from shardq.errors import UnsupportedSource
from shardq.halves import holds_halves
from shardq.stacks import ExpertStack, find_stacks

Load = Callable[[str, torch.dtype], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Piece:
    """One expert's matrix or bias."""

    tensor: str  # of the checkpoint
    expert: int
    lines: range  # of the outputs of its slice
    transposed: bool  # slices are [inputs, outputs]


@dataclass(frozen=True, slots=True)
class Joint:
    """How a stack is made of its experts."""

    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]

    def make(self, dtype: torch.dtype, load: Load) -> torch.Tensor:
        """The stack; each expert's tensor is loaded when it is its turn."""
        made = torch.empty(self.shape, dtype=dtype)
        for p in self.pieces:
            value = load(p.tensor, dtype)
            goal = made[p.expert].T if p.transposed else made[p.expert]
            goal[p.lines.start : p.lines.stop : p.lines.step] = value
        return made


def find_joints(
    state: Mapping[str, torch.Tensor], missing: Sequence[str], tensors: Mapping[str, str], config: Any
) -> dict[str, Joint]:
    """The stacks among the `missing` parameters of a model that can be made of single experts, whole or not at all.

    `tensors`: what else the checkpoint has, by the name that it would have in the model. How a slice holds its matrices
    is told by shapes and families.toml, as for a stack in a checkpoint.
    """
    wanted = {n for n in missing if "expert" in n and state[n].ndim in (2, 3)}
    refs = [TensorRef(n, "", "BF16", tuple(state[n].shape), 0, 2 * state[n].numel()) for n in state if n in wanted]
    if not any(r.shape and len(r.shape) == 3 for r in refs):
        return {}
    try:
        stacks = find_stacks(refs, config, halves=holds_halves(config))
    except UnsupportedSource:  # not a family that is known: the parameters are missing, and that is told
        return {}
    joints = {}
    for stack in stacks:
        for parameter, pieces in ((stack.tensor, _matrices(stack)), (stack.bias, _biases(stack))):
            found = tuple(_placed(pieces, tensors))
            if parameter is not None and found and len(found) == sum(1 for _ in _names(stack, parameter)):
                joints[parameter] = Joint(tuple(state[parameter].shape), found)
    return joints


def _names(stack: ExpertStack, parameter: str) -> Iterator[str]:
    yield from (m.name for m in (stack.matrices() if parameter == stack.tensor else stack.biases()))


def _matrices(stack: ExpertStack) -> Iterator[Piece]:
    return (Piece(m.name, m.expert, m.lines, m.transposed) for m in stack.matrices())


def _biases(stack: ExpertStack) -> Iterator[Piece]:
    return (Piece(b.name, b.expert, b.lines, transposed=False) for b in stack.biases())


def _placed(pieces: Iterator[Piece], tensors: Mapping[str, str]) -> Iterator[Piece]:
    """With the names of the checkpoint."""
    for p in pieces:
        if (name := tensors.get(p.tensor)) is not None:
            yield Piece(name, p.expert, p.lines, p.transposed)
