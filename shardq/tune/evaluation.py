"""How well a model predicts a text, and how far its predictions are from another's: both go through their blocks side
by side, so that one block of each is in memory at most.

Source of the definitions: perplexity over all tokens but the first of each window; KL(reference || model) as the mean
over tokens in nats; agreement of the likeliest token.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final

import torch

from shardq.errors import BadOption
from shardq.tune.activations import Batch
from shardq.tune.blocks import BlockModel
from shardq.tune.spool import Spooling, in_memory, make_beside

if TYPE_CHECKING:
    from shardq.tune.tokenizing import Tokenizer

HEAD_TOKENS: Final = 128  # of which logits are there at once
P99: Final = 0.99
Told = Callable[[int, int], None]  # blocks done, and all


@dataclass(frozen=True, slots=True)
class Distance:
    """How far predictions are from a reference's."""

    kl: float  # mean of KL(reference || model), in nats
    kl_se: float  # its standard error, tokens taken as independent
    kl_p99: float
    top1: float  # share of tokens whose likeliest successor is the same
    reference_ppl: float


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What came out."""

    windows: int
    tokens: int  # that were predicted: all but the first of each window
    ppl: float
    nll_se: float  # standard error of the mean loss
    distance: Distance | None  # None without a reference


def cut_windows(tokenizer: "Tokenizer", text: str, windows: int, seqlen: int) -> torch.Tensor:
    """Evenly spaced windows of a text that is tokenized as a whole, [windows, seqlen]: its begin and its end take part.
    Raises BadOption for a text with too few tokens."""
    if windows < 1 or seqlen < 2:
        raise BadOption(f"evaluation needs a window of two tokens at least, not {windows} of {seqlen}")
    (ids,) = tokenizer.encode([text], len(text.encode()) + tokenizer.around)
    if len(ids) < windows * seqlen:
        raise BadOption(
            f"the text has {len(ids)} tokens, and {windows} windows of {seqlen} need {windows * seqlen}: give a longer "
            "text, or fewer windows"
        )
    step = (len(ids) - seqlen) // (windows - 1) if windows > 1 else 0
    return torch.tensor([ids[i * step : i * step + seqlen] for i in range(windows)], dtype=torch.int64)


@torch.no_grad()
def evaluate(
    model: BlockModel, ids: torch.Tensor, reference: BlockModel | None = None, report: Told | None = None,
    spooling: Spooling | None = None,
) -> Evaluation:  # fmt: skip
    """Run windows of ids, [windows, tokens] int64, through a model, and through its reference if there is one.

    In memory: one block of either, hidden states of all windows for both, and for the end both heads and the logits of
    HEAD_TOKENS tokens. `spooling`: where hidden states lie; None: in memory. Raises BadOption for models with another
    vocabulary, and what spooling and reading raise.
    """
    models = [m for m in (model, reference) if m is not None]
    if len({m.config.get_text_config().vocab_size for m in models}) > 1:
        raise BadOption(f"{model.source.label} and its reference have vocabularies of other sizes: not the same model")
    first = model.embed(ids, partial(spooling.make, copies=len(models)) if spooling else in_memory)
    batches = [first, *(m.embed(ids, partial(make_beside, first.hidden)) for m in models[1:])]
    total, done = sum(len(m.block_names) for m in models), 0
    for index in range(max(len(m.block_names) for m in models)):
        for m, batch in zip(models, batches, strict=True):
            if index < len(m.block_names):
                with m.block(index) as module:
                    m.prefetch(index + 1)
                    m.advance(module, batch, index)
                done += 1
                if report:
                    report(done, total)
    return _judge(models, batches, ids)


@dataclass(slots=True)
class _Kept:
    """Figures of tokens, in their order."""

    loss: list[torch.Tensor]
    reference_loss: list[torch.Tensor]
    kl: list[torch.Tensor]
    same: list[torch.Tensor]


def _judge(models: list[BlockModel], batches: list[Batch], ids: torch.Tensor) -> Evaluation:
    kept = _Kept([], [], [], [])
    for window, begin, hidden in _pieces(batches):
        found = [m.logits(h)[0].float().log_softmax(-1) for m, h in zip(models, hidden, strict=True)]
        following = ids[window, begin + 1 : begin + 1 + HEAD_TOKENS, None]
        kept.loss.append(-found[0][: len(following)].gather(1, following)[:, 0])
        if len(found) > 1:
            kept.reference_loss.append(-found[1][: len(following)].gather(1, following)[:, 0])
            kept.kl.append((found[1].exp() * (found[1] - found[0])).sum(-1))
            kept.same.append((found[1].argmax(-1) == found[0].argmax(-1)).float())
    for m in models:
        m.free_head()
    loss = torch.cat(kept.loss)
    return Evaluation(len(ids), loss.numel(), math.exp(loss.mean()), _error_of_mean(loss), _distance(kept))


def _pieces(batches: list[Batch]) -> Iterator[tuple[int, int, list[torch.Tensor]]]:
    """A window, a token of it, and from there on hidden states of HEAD_TOKENS tokens, [1, tokens, width] of each."""
    windows, tokens = batches[0].hidden.shape[:2]
    for window in range(windows):
        whole = [b.hidden[window : window + 1] for b in batches]
        for begin in range(0, tokens, HEAD_TOKENS):
            yield window, begin, [h[:, begin : begin + HEAD_TOKENS] for h in whole]


def _distance(kept: _Kept) -> Distance | None:
    if not kept.kl:
        return None
    kl = torch.cat(kept.kl)
    return Distance(
        float(kl.mean()),
        _error_of_mean(kl),
        float(kl.quantile(P99)),
        float(torch.cat(kept.same).mean()),
        math.exp(torch.cat(kept.reference_loss).mean()),
    )


def _error_of_mean(values: torch.Tensor) -> float:
    return float(values.std() / values.numel() ** 0.5) if values.numel() > 1 else 0.0
