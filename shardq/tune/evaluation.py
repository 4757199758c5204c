"""How well a model predicts a text, and how far its predictions are from another's: both go through their blocks side
by side, so that one block of each is in memory at most.

Source of the definitions: perplexity over all tokens but the first of each window; KL(reference || model) as the mean
over tokens in nats; agreement of the likeliest token.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import torch

from shardq.errors import BadOption
from shardq.tune.activations import Batch
from shardq.tune.blocks import BlockModel

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
    model: BlockModel, ids: torch.Tensor, reference: BlockModel | None = None, report: Told | None = None
) -> Evaluation:
    """Run windows of ids, [windows, tokens] int64, through a model, and through its reference if there is one.

    In memory: one block of either, hidden states of all windows for both, and for the end both heads and the logits of
    HEAD_TOKENS tokens. Raises BadOption for models with another vocabulary, and what reading raises.
    """
    models = [m for m in (model, reference) if m is not None]
    if len({m.config.get_text_config().vocab_size for m in models}) > 1:
        raise BadOption(f"{model.source.label} and its reference have vocabularies of other sizes: not the same model")
    batches = [m.embed(ids) for m in models]
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
    for window, begin, end in _pieces(ids):
        hidden = [b.states[window : window + 1, begin:end] for b in batches]
        found = [m.logits(h)[0].float().log_softmax(-1) for m, h in zip(models, hidden, strict=True)]
        following = ids[window, begin + 1 : end + 1, None]
        kept.loss.append(-found[0][: len(following)].gather(1, following)[:, 0])
        if len(found) > 1:
            kept.reference_loss.append(-found[1][: len(following)].gather(1, following)[:, 0])
            kept.kl.append((found[1].exp() * (found[1] - found[0])).sum(-1))
            kept.same.append((found[1].argmax(-1) == found[0].argmax(-1)).float())
    for m in models:
        m.free_head()
    loss = torch.cat(kept.loss)
    return Evaluation(len(ids), loss.numel(), math.exp(loss.mean()), _error_of_mean(loss), _distance(kept))


def _pieces(ids: torch.Tensor) -> Iterator[tuple[int, int, int]]:
    windows, tokens = ids.shape
    for window in range(windows):
        for begin in range(0, tokens, HEAD_TOKENS):
            yield window, begin, min(tokens, begin + HEAD_TOKENS)


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
