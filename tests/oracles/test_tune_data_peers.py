"""Calibration samples are those of auto-round, and ids those of transformers, with SmolLM2's tokenizer."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from shardq.sources.local import open_folder
from shardq.tune.data import load_samples
from shardq.tune.tokenizing import Tokenizer, open_tokenizer

pytestmark = pytest.mark.oracle
transformers = pytest.importorskip("transformers", reason="`nox -s oracles` installs it")
pytest.importorskip("tokenizers", reason="shardq[tune] brings it")

SEQLEN = 32
TEXT = "the quick brown fox jumps over lazy dogs while 42 grey wolves howl; naïve façades, 東京, and"
WORDS = [*TEXT.split(), "\n\ttabs"]


@pytest.fixture(scope="module")
def tokenizers(smollm2: Path) -> tuple[Tokenizer, Any]:
    """Ours, theirs."""
    return open_tokenizer(open_folder(str(smollm2))), transformers.AutoTokenizer.from_pretrained(smollm2)


def write_texts(path: Path, count: int, start: int) -> str:
    """Texts of 5 to 80 words, some of which repeat one."""
    lines = []
    for number in range(start, start + count):
        text = " ".join(WORDS[(number * 7 + k * k) % len(WORDS)] for k in range(5 + number * 13 % 76))
        lines.append(json.dumps({"text": "dog " * 60 if number % 17 == 0 else text, "n": number}))
    path.write_text("\n".join(lines))
    return str(path)


def test_ids_are_those_of_transformers(tokenizers: tuple[Tokenizer, Any]) -> None:
    ours, theirs = tokenizers
    for text in ("", " a", "Hello <|im_start|>user\n1234\t\u00e9\u4e1c <|endoftext|>", "x" * 3000, *WORDS):
        assert ours.encode([text], 100) == [theirs(text, truncation=True, max_length=100)["input_ids"]]
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi <there>"}]
    expected = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert ours.template is not None
    assert ours.template.render(messages) == expected


@pytest.mark.parametrize(
    "form",
    [
        "{a}",
        "{a}:num=7",
        "{a}:apply_chat_template",
        "{a}:system_prompt=Short",
        "{a},{b}",
        "{a}:num=5,{b}",
        "{b}:num=30,{a}:num=1",
    ],
)
@pytest.mark.parametrize("seed", [42, 7])
def test_samples_are_those_of_auto_round(
    form: str, seed: int, tokenizers: tuple[Tokenizer, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AR_DISABLE_DATASET_SUBPROCESS", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    theirs = pytest.importorskip("auto_round.calib_dataset", reason="`nox -s oracles` installs it")
    data = form.format(a=write_texts(tmp_path / "a.jsonl", 60, 1), b=write_texts(tmp_path / "b.jsonl", 90, 1000))
    found = load_samples(data, tokenizers[0], count=24, seqlen=SEQLEN, seed=seed)
    batches = theirs.get_dataloader(tokenizers[1], SEQLEN, data, seed, bs=8, nsamples=24)
    expected = torch.cat([b["input_ids"] for b in batches if b is not None])
    assert found.ids.shape == expected.shape
    assert torch.equal(found.ids, expected)


def test_joined_samples_are_auto_rounds_texts_without_borders(
    tokenizers: tuple[Tokenizer, Any], tmp_path: Path
) -> None:
    """Of what 0.16.1 reads and shuffles; its own `concat` fails there on every set (a mask of two dimensions)."""
    theirs = pytest.importorskip("auto_round.calib_dataset", reason="`nox -s oracles` installs it")
    path = write_texts(tmp_path / "a.jsonl", 60, 1)
    rows = theirs.CALIB_DATASETS["local"](tokenizers[1], SEQLEN, path, seed=42)
    flat = torch.tensor([i for row in rows for i in row["input_ids"]])
    found = load_samples(f"{path}:concat", tokenizers[0], count=20, seqlen=SEQLEN, seed=42)
    windows = flat[: len(flat) // SEQLEN * SEQLEN].reshape(-1, SEQLEN)
    plain = [w for w in windows if (w == w[-1]).sum() <= SEQLEN // 2]
    assert torch.equal(found.ids, torch.stack(plain)[:20])
