"""Gradients of a whole model with one block of it in memory: a pass that keeps what goes into each block, and a way
back that runs block after block once more and hands on what a loss changes with its input."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from shardq.tune.activations import Batch
from shardq.tune.blocks import BlockModel
from shardq.tune.evaluation import HEAD_TOKENS
from shardq.tune.spool import Hidden, Spooling

Loss = Callable[[Tensor, int, int], Tensor]  # logits [tokens, vocabulary] in fp32, sample, first token -> a sum
Told = Callable[[], None]


@dataclass(frozen=True, slots=True)
class Passed:
    """A pass through a model."""

    inputs: tuple[Hidden, ...]  # of each block, [samples, tokens, width]
    batch: Batch  # behind the last one


def pass_blocks(model: BlockModel, ids: Tensor, spooling: Spooling, report: Told | None = None) -> Passed:
    """Run samples of ids, [samples, tokens] int64, through all blocks. Hidden states lie in files where they would take
    too much memory, all of them and the gradients behind them together. Raises what `Spooling.make` does."""
    # What goes into each block is kept, and what comes out of the last; the gradients of that are a tensor.
    batch = model.embed(ids, partial(spooling.make, copies=len(model.block_names) + 1, in_ram=1))
    inputs = []
    for index in range(len(model.block_names)):
        inputs.append(batch.hidden.clone())
        with model.block(index) as block:
            model.prefetch(index + 1)
            model.advance(block, batch, index)
        if report:
            report()
    return Passed(tuple(inputs), batch)


def head_gradients(model: BlockModel, hidden: Hidden, loss: Loss) -> Tensor:
    """What a loss changes with hidden states behind the last block, [samples, tokens, width]: of each sample for
    itself. The loss is asked for HEAD_TOKENS tokens at a time."""
    found = torch.empty(hidden.shape, dtype=hidden.dtype)
    for sample in range(len(hidden)):
        whole = hidden[sample : sample + 1]
        for begin in range(0, hidden.shape[1], HEAD_TOKENS):
            part = whole[:, begin : begin + HEAD_TOKENS].detach().clone().requires_grad_()
            (found[sample : sample + 1, begin : begin + HEAD_TOKENS],) = torch.autograd.grad(
                loss(model.logits(part)[0].float(), sample, begin), part
            )
    model.free_head()
    return found


def block_gradients(
    model: BlockModel, block: nn.Module, index: int, inputs: Batch, back: Tensor, parameters: Sequence[str]
) -> Iterator[Mapping[str, Tensor]]:
    """For each sample what a loss changes with parameters of a block, by name; those that a sample does not reach are
    left out. `back` has what it changes with the block's output, and gets, where it lies, the same of its input."""
    own = {name: block.get_parameter(name).requires_grad_() for name in parameters}
    for sample, part in enumerate(inputs.split(1)):
        hidden = part.states.detach().clone().requires_grad_()
        made = model.run(block, part.moved(hidden), index)
        first, *rest = torch.autograd.grad(
            made, [hidden, *own.values()], back[sample : sample + 1], allow_unused=True, materialize_grads=False
        )
        back[sample : sample + 1] = first
        yield {name: g for name, g in zip(own, rest, strict=True) if g is not None}
