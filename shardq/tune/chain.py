"""Hidden states of all samples on their way through the blocks: with the checkpoint's weights, and with those that
codes stand for."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from shardq.tune.activations import Batch
from shardq.tune.blocks import BlockModel
from shardq.tune.spool import CPU, Hidden, Spooling


@dataclass(slots=True)
class Chain:
    """Both ways. Where codes do not feed the next block, `inputs` is what the plain way gave to this one."""

    model: BlockModel
    inputs: Batch  # of the block that is tuned next
    plain: Batch | None  # the way without codes; None if nobody asks for it
    quanted: bool  # what a block with codes gives is the next one's input

    def enter(self, blocks: Sequence[nn.Module], first: int) -> Hidden | None:
        """Take the plain way through some blocks; returns what it gave behind the last."""
        if self.plain is None:
            return None
        if not self.quanted:
            for sample, part in enumerate(self.plain.split(1)):
                self.inputs.hidden[sample : sample + 1] = part.states
        for index, block in enumerate(blocks, first):
            self.model.advance(block, self.plain, index)
        return self.plain.hidden

    def leave(self, blocks: Sequence[nn.Module], first: int) -> None:
        """Take the other way through the blocks, which have the weights of their codes now."""
        if self.quanted:
            for index, block in enumerate(blocks, first):
                self.model.advance(block, self.inputs, index)

    def end(self, change: Callable[[Batch], Batch]) -> tuple[Batch, Batch | None]:
        """Inputs of what comes behind the last block, and the same on the plain way, by what `change` makes of each."""
        if self.plain is None:
            return change(self.inputs), None
        plain = change(self.plain)
        return (change(self.inputs) if self.quanted else plain), plain


def begin_chain(
    model: BlockModel, ids: torch.Tensor, *, plain: bool, quanted: bool, spooling: Spooling,
    device: torch.device = CPU, resident: bool = True,
) -> Chain:  # fmt: skip
    """Samples [n, tokens] before the first block, which is computed on a device; hidden states lie there, too, if
    `resident`, else in main memory, or in files where memory must not hold them. Raises what `Spooling.make` does."""
    batch = model.embed(ids, partial(spooling.make, copies=1 + plain))
    batch = batch.on(device, whole=resident and isinstance(batch.hidden, torch.Tensor))
    return Chain(model, batch.moved(batch.hidden.clone()) if plain else batch, batch if plain else None, quanted)
