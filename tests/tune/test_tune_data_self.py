"""Tokens that a model samples itself are those that the whole model would sample."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers_made import BOS, WORDS, make_tokenizer

from shardq.errors import BadOption
from shardq.sources.local import open_folder
from shardq.tune.data import load_samples
from shardq.tune.data_random import draw, draw_fractions
from shardq.tune.tokenizing import Tokenizer

transformers = pytest.importorskip("transformers", reason="shardq[tune] brings it")
from shardq.tune.blocks import BlockModel  # noqa: E402
from shardq.tune.data_self import sample_self  # noqa: E402

SIZES = {"vocab_size": 256, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 16}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64}
MODELS: dict[str, dict[str, Any]] = {
    "LlamaConfig": {"tie_word_embeddings": True},
    "Gemma3TextConfig": {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
}
COUNT, SEQLEN, SEED = 2, 9, 5


def write_model(kind: str, folder: Path) -> tuple[BlockModel, Any, Tokenizer]:
    """Block by block, whole, and a tokenizer that puts <s> before a text."""
    torch.manual_seed(0)
    config = getattr(transformers, kind)(**SIZES, **HEADS, **MODELS[kind])
    whole = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        for parameter in whole.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    whole.save_pretrained(folder)
    tokenizer = make_tokenizer(folder, around=True)
    model = BlockModel.open(open_folder(str(folder)), dtype=torch.float32, attention="eager")
    return model, whole.eval(), tokenizer


@torch.no_grad()
def sample_whole(whole: Any, tokenizer: Tokenizer) -> list[list[int]]:
    """One sample and one token at a time, everything computed again for each."""
    first = draw(len(tokenizer.regular), COUNT, SEED)
    chances = draw_fractions(COUNT * SEQLEN, SEED + 1).reshape(COUNT, SEQLEN)
    samples = []
    for place, own in zip(first, chances, strict=True):
        ids = [*tokenizer.prefix, tokenizer.regular[place]]
        while len(ids) < SEQLEN:
            odds = torch.softmax(whole(torch.tensor([ids]), use_cache=False).logits[0, -1].double(), 0)
            allowed = [i for i in range(tokenizer.limit) if i not in tokenizer.special]
            total, target, below = float(odds[allowed].sum()), float(own[len(ids)]), 0.0
            for i in allowed:
                below += float(odds[i]) / total
                if below > target:
                    ids.append(i)
                    break
        samples.append(ids)
    return samples


@pytest.mark.parametrize(("kind", "resident"), [("LlamaConfig", 0), ("LlamaConfig", 9), ("Gemma3TextConfig", 1)])
def test_samples_are_those_of_the_whole_model(kind: str, resident: int, tmp_path: Path) -> None:
    model, whole, tokenizer = write_model(kind, tmp_path)
    told: list[tuple[int, int]] = []
    with model:
        found = sample_self(
            model, tokenizer, COUNT, SEQLEN, SEED, resident=resident, report=lambda *step: told.append(step)
        )
    assert found.ids.tolist() == sample_whole(whole, tokenizer)
    assert (found.ids[:, 0] == BOS).all()
    assert (found.ids[:, 1] < WORDS).all()
    assert (found.kind, found.label, found.seed) == ("self-generated", "self", SEED)
    assert told == [(done, SEQLEN) for done in range(3, SEQLEN + 1)]


def test_it_is_what_self_stands_for(tmp_path: Path) -> None:
    model, _, tokenizer = write_model("LlamaConfig", tmp_path)
    with model:
        found = load_samples(
            "self", tokenizer, count=2, seqlen=6, seed=1, sampler=lambda *asked: sample_self(model, tokenizer, *asked)
        )
        assert found.ids.shape == (2, 6)
        with pytest.raises(BadOption, match="samples of 1 tokens"):
            sample_self(model, tokenizer, 1, 1, 0)
