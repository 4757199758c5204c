"""Tokens that the model samples itself: calibration data that is like its own text, without any.

As LLM-QAT (arXiv:2305.17888) makes it, without its first greedy steps: a sample begins with what the tokenizer puts
before a text and one id drawn uniformly from those that are text; each further id is drawn from the model's own
distribution (temperature 1, special ids left out), for all samples at once. A token needs one pass through the model,
block by block: many short samples cost less than few long ones. What blocks remember of earlier tokens is in memory.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from shardq.errors import BadOption
from shardq.tune.data import Samples
from shardq.tune.data_grammar import SELF
from shardq.tune.data_random import draw, draw_fractions
from shardq.tune.library import import_whole
from shardq.tune.tokenizing import Tokenizer

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from shardq.tune.blocks import BlockModel


@torch.no_grad()
def sample_self(
    model: "BlockModel",
    tokenizer: Tokenizer,
    count: int,
    seqlen: int,
    seed: int,
    *,
    resident: int = 0,
    report: Callable[[int, int], None] | None = None,
) -> Samples:
    """`count` samples of `seqlen` ids each; the same for a seed wherever the model gives the same logits.

    `resident`: so many blocks, from the first on, stay in memory between passes. `report` gets tokens of a sample done,
    and all. A sample is the same whatever the others are, as far as the model's arithmetic does not depend on the size
    of a batch. Raises BadOption for samples without room for a sampled token, and what reading the model raises.
    """
    begun = len(tokenizer.prefix) + 1
    if seqlen < begun:
        raise BadOption(f"samples of {seqlen} tokens: {tokenizer.label} begins them with {len(tokenizer.prefix)}")
    first = draw(len(tokenizer.regular), count, seed)
    ids = torch.tensor([[*tokenizer.prefix, tokenizer.regular[place]] for place in first.tolist()])
    chances = draw_fractions(count * seqlen, seed + 1).reshape(count, seqlen)
    cache = import_whole().DynamicCache(config=model.config)
    with ExitStack() as stack:
        stack.enter_context(model.embedding())
        kept = [stack.enter_context(model.block(i)) for i in range(min(resident, len(model.block_names)))]
        fresh = ids
        while ids.shape[1] < seqlen:
            hidden = _pass(model, kept, fresh, cache)
            fresh = _choose(model.logits(hidden[:, -1:])[:, 0], tokenizer, chances[:, ids.shape[1]])
            ids = torch.cat([ids, fresh], 1)
            if report:
                report(ids.shape[1], seqlen)
    return Samples(ids, SELF, "self-generated", 0, seed)


def _pass(model: "BlockModel", kept: Sequence[nn.Module], ids: torch.Tensor, cache: Any) -> torch.Tensor:
    """Hidden states behind the last block of ids that follow what the cache has."""
    batch = model.embed_next(ids, cache)
    model.prefetch(len(kept))
    for index in range(len(model.block_names)):
        if index < len(kept):
            batch = batch.moved(model.run(kept[index], batch, index))
            continue
        with model.block(index) as module:
            model.prefetch(index + 1)
            batch = batch.moved(model.run(module, batch, index))
    return batch.states


def _choose(logits: torch.Tensor, tokenizer: Tokenizer, chances: "NDArray[np.float64]") -> torch.Tensor:
    """An id for each row of logits [samples, vocabulary], where its chance falls: [samples, 1]."""
    ids = logits.shape[1]
    left_out = sorted({i for i in tokenizer.special if i < ids} | set(range(tokenizer.limit, ids)))
    logits = logits.double().index_fill(1, torch.tensor(left_out, dtype=torch.int64), -torch.inf)
    bounds = torch.softmax(logits, 1).cumsum(1)
    found = torch.searchsorted(bounds, torch.from_numpy(chances)[:, None] * bounds[:, -1:], right=True)
    return found.clamp(max=max(tokenizer.regular))
