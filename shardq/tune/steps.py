"""How what SignRound learns moves: by signs of gradients, or as Adam has it.

Source: auto-round 0.16.1, `algorithms/quantization/sign_round/sign_sgd.py` and `adam_round/adam.py`: the sign of a
momentum's buffer, which begins as the first gradient, v <- momentum * v + gradient; AdamW of torch with its own numbers
and no decay of weights, of a loss that is not multiplied. Factors are put back into [0, 1] before they are used.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol

import torch
from torch import Tensor

LOSS_SCALE: Final = 1000.0  # of signs: what a loss is multiplied by before it has gradients


@dataclass(frozen=True, slots=True)
class Moved:
    """Tensors that move alike."""

    tensors: tuple[Tensor, ...]
    rate: float  # of the first step
    bounded: bool  # kept from 0 to 1


class Steps(Protocol):
    """One of them for a block."""

    @property
    def loss_scale(self) -> float:
        """What a loss is multiplied by."""

    @property
    def at_once(self) -> bool:
        """True if a tensor, or a part of one, may move as soon as its gradient is there (`move_part`)."""

    def move(self, share: float) -> None:
        """One step of the rates' share; gradients are gone then. What has none stays."""


@dataclass(frozen=True, slots=True)
class SignSteps:
    """By signs."""

    moved: Sequence[Moved]
    momentum: float
    buffers: dict[int, Tensor] = field(default_factory=dict)  # by place
    loss_scale: float = LOSS_SCALE

    @property
    def at_once(self) -> bool:
        """See Steps."""
        return self.momentum == 0

    @torch.no_grad()
    def move(self, share: float) -> None:
        """See Steps."""
        place = 0
        for m in self.moved:
            for tensor in m.tensors:
                if tensor.grad is not None:
                    if self.at_once:
                        move_part(tensor, tensor.grad, m.rate * share)
                    else:
                        tensor.sub_(self._direction(place, tensor.grad), alpha=m.rate * share)
                    if m.bounded:
                        tensor.clamp_(0, 1)
                    tensor.grad = None
                place += 1

    def _direction(self, place: int, grad: Tensor) -> Tensor:
        if place in self.buffers:
            self.buffers[place].mul_(self.momentum).add_(grad)
        else:
            self.buffers[place] = grad.clone()
        return self.buffers[place].sign()


def move_part(part: Tensor, grad: Tensor, step: float) -> None:
    """A step against the signs of a gradient, which is lost."""
    part.sub_(grad.sign_(), alpha=step)


class AdamSteps:
    """By AdamW."""

    loss_scale = 1.0
    at_once = False

    def __init__(self, moved: Sequence[Moved]) -> None:
        self._moved = moved
        groups = [{"params": list(m.tensors), "lr": m.rate} for m in moved]
        self._adam = torch.optim.AdamW(groups, weight_decay=0)

    @torch.no_grad()
    def move(self, share: float) -> None:
        """See Steps."""
        for group, m in zip(self._adam.param_groups, self._moved, strict=True):
            group["lr"] = m.rate * share
        self._adam.step()
        self._adam.zero_grad(set_to_none=True)
        for m in self._moved:
            for tensor in m.tensors if m.bounded else ():
                tensor.clamp_(0, 1)


def make_steps(moved: Sequence[Moved], *, adam: bool, momentum: float) -> Steps:
    """As options ask for it; Adam has a momentum of its own."""
    return AdamSteps(moved) if adam else SignSteps(moved, momentum)
