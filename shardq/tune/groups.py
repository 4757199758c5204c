"""Consecutive blocks as one, for a loss behind the last of them (auto-round's nblocks)."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from shardq.tune.activations import Batch, Call
from shardq.tune.subjects import Subject

Step = tuple[tuple[Any, ...], Mapping[str, Any]]  # what a block is called with beside hidden states


class Group(nn.Module):
    """Blocks one after the other; parameters are named by the place of their block: `0.mlp.up_proj.weight`."""

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        for place, block in enumerate(blocks):
            self.add_module(str(place), block)

    def forward(self, hidden: torch.Tensor, steps: Sequence[Step]) -> torch.Tensor:
        """Hidden states behind the last block, [samples, tokens, width]."""
        for block, (args, kwargs) in zip(self.children(), steps, strict=True):
            found = block(hidden, *args, **kwargs)
            hidden = found[0] if isinstance(found, tuple | list) else found
        return hidden


def group_batch(batch: Batch, first: int, stop: int) -> Batch:
    """The same samples, with one call that stands for those of some blocks; it is the only one."""
    steps = tuple((c.args, dict(c.kwargs)) for c in batch.calls[first:stop])
    return replace(batch, calls=(Call((steps,), {}),))


def group_subjects(of_blocks: Sequence[Sequence[Subject]]) -> tuple[Subject, ...]:
    """The matrices of some blocks, at their places in the group."""
    return tuple(
        replace(s, place=replace(s.place, parameter=f"{place}.{s.place.parameter}"))
        for place, own in enumerate(of_blocks)
        for s in own
    )
