"""The output projection, tuned like a block: by hidden states before it, and for SignRound by its logits.

Source: auto-round 0.16.1, `quantize_layer_outside_block`: a layer outside of blocks is tuned with one sample at a time,
as many of them to a step as a block's has; its target is what its own weights make of the way without codes. Logits are
made when they are asked for, and of one sample, so that memory does not grow with the samples.
"""

from dataclasses import dataclass, replace

import torch
from torch import nn

from shardq.errors import UnsupportedSource
from shardq.tune.activations import Batch, Call
from shardq.tune.blocks import BlockModel
from shardq.tune.settings import SignRoundOptions
from shardq.tune.spool import Hidden


@dataclass(frozen=True, slots=True)
class Logits:
    """Of hidden states [samples, tokens, width] before a head, by its own weights, sample by sample."""

    head: nn.Module
    hidden: Hidden
    device: torch.device  # of the head

    def __len__(self) -> int:
        return len(self.hidden)

    @torch.no_grad()
    def __getitem__(self, samples: list[int]) -> torch.Tensor:
        """[samples, tokens, vocabulary]."""
        found: torch.Tensor = self.head(self.hidden[samples].to(self.device))
        return found


def head_inputs(model: BlockModel, batch: Batch) -> Batch:
    """Samples behind the last block as they come into the head, which is called with nothing else. Hidden states are
    replaced where they lie. Raises UnsupportedSource for a head of another width."""
    for sample, part in enumerate(batch.split(1)):
        made = model.before_head(part.states.cpu())
        if made.shape != part.hidden.shape:
            raise UnsupportedSource(
                f"{model.checkpoint.label}: its head gets {list(made.shape)} of {list(part.hidden.shape)}: expected "
                "the width of its blocks; leave --quant-lm-head out"
            )
        batch.hidden[sample : sample + 1] = made
    return replace(batch, calls=(Call((), {}),))


def head_options(options: SignRoundOptions) -> SignRoundOptions:
    """One sample at a time, and as many to a step as of a block."""
    samples = options.batch_size * options.gradient_accumulate_steps
    return replace(options, batch_size=1, gradient_accumulate_steps=samples)
