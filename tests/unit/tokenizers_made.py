"""Tokenizers made for tests: one id for each word w0, w1, ..., and special tokens around as asked for."""

import json
from pathlib import Path
from typing import Any, Final

import pytest

tokenizers = pytest.importorskip("tokenizers", reason="shardq[gguf] and shardq[tune] bring it")
from shardq.sources.local import open_folder  # noqa: E402
from shardq.tune.tokenizing import Tokenizer, open_tokenizer  # noqa: E402

WORDS: Final = 200
BOS, EOS, MARK = WORDS, WORDS + 1, WORDS + 2  # ids; MARK is added to the vocabulary, but not special
TEMPLATE: Final = (
    "{% for m in messages %}{{ m['role'] == 'system' and 'w7 ' or '' }}{{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}w9{% endif %}"
)


def write_tokenizer(folder: Path, around: bool = False, **config: Any) -> Path:
    """A tokenizer.json; `around`: its post-processor puts <s> and </s> around a text."""
    vocabulary = {f"w{i}": i for i in range(WORDS)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="w0"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(["<s>", "</s>"])
    backend.add_tokens(["<mark>"])
    if around:
        backend.post_processor = tokenizers.processors.TemplateProcessing(
            single=["<s>:0", "$A:0", "</s>:0"], special_tokens=[("<s>", BOS), ("</s>", EOS)]
        )
    folder.mkdir(parents=True, exist_ok=True)
    backend.enable_truncation(3)  # a tokenizer.json may have this; it must not cut texts
    backend.save(str(folder / "tokenizer.json"))
    named = {"bos_token": "<s>", "eos_token": {"__type": "AddedToken", "content": "</s>", "special": True}, **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    return folder


def make_tokenizer(folder: Path, around: bool = False, **config: Any) -> Tokenizer:
    """The same, opened."""
    return open_tokenizer(open_folder(str(write_tokenizer(folder, around, **config))))


def words(*ids: int) -> str:
    """The text of some ids."""
    return " ".join(f"w{i}" for i in ids)
