"""Real vocabularies, from the files beside llama.cpp's converter, back in the form from which it reads them.

LLAMA_CPP as in test_gguf_converter.py, with `models` in it.
"""

import json
import os
import struct
from pathlib import Path
from typing import Any

import gguf_models_made as made
import pytest

from shardq.gguf.metadata import find_metadata
from shardq.gguf.model_files import ModelFiles

pytestmark = pytest.mark.oracle
pytest.importorskip("tokenizers", reason="vocabularies are read with the package tokenizers")
gguf = pytest.importorskip("gguf", reason="vocabularies are in GGUF files")
MODELS = Path(os.environ.get("LLAMA_CPP", ""), "models")
if not (MODELS / "ggml-vocab-qwen2.gguf").exists():
    pytest.skip("LLAMA_CPP names no folder with models of vocabularies", allow_module_level=True)

CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
WORDS = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
PLAIN_BYTES = {**BYTES, "use_regex": False}
DIGITS = {"type": "Digits", "individual_digits": True}


def split(digits: str) -> list[dict[str, Any]]:
    pattern = {"Regex": WORDS % digits}
    return [{"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}, PLAIN_BYTES]


# As the models have them on the Hub: pre-tokenizers, and other parts of tokenizer.json.
KINDS: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "gpt-2": ([BYTES], {}),
    "starcoder": ([DIGITS, BYTES], {}),
    "qwen2": (split(r"\p{N}"), {"normalizer": {"type": "NFC"}}),
    "llama-bpe": (split(r"\p{N}{1,3}"), {"ignore_merges": True}),
}


def fields(name: str) -> dict[str, Any]:
    reader = gguf.GGUFReader(MODELS / f"ggml-vocab-{name}.gguf")
    return {key.removeprefix("tokenizer.ggml."): field.contents() for key, field in reader.fields.items()}


def found(config: dict[str, Any], files: dict[str, bytes]) -> dict[str, Any]:
    model = ModelFiles("model", {"config.json": json.dumps(config).encode(), **files})
    pairs = find_metadata(model, (), 32)
    return {
        p.key.removeprefix("tokenizer.ggml."): list(p.value) if isinstance(p.value, tuple) else p.value for p in pairs
    }


@pytest.mark.parametrize("name", KINDS)
def test_byte_level_vocabularies_and_their_fingerprints(name: str) -> None:
    theirs = fields(name)
    steps, more = KINDS[name]
    tokens, kinds = theirs["tokens"], theirs["token_type"]
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [
        {"id": i, "content": token, **plain, "special": kind == 3}
        for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
        if kind in (3, 4)
    ]
    first = tokens[theirs["bos_token_id"]] if name == "llama-bpe" else None
    last = max(i for i, kind in enumerate(kinds) if kind == 1)
    vocabulary = {token: i for i, token in enumerate(tokens[: last + 1])}
    tokenizer = {
        "version": "1.0", "added_tokens": added, "normalizer": more.get("normalizer"),
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps}, "decoder": BYTES,
        "post_processor": begins(first, tokens.index(first)) if first else None,
        "model": {
            "type": "BPE", "vocab": vocabulary, "merges": theirs["merges"], "dropout": None, "fuse_unk": False,
            "byte_fallback": False, "ignore_merges": more.get("ignore_merges", False),
        },
    }  # fmt: skip
    config = made.config("Qwen2MoeForCausalLM", "qwen2_moe", vocab_size=len(tokens))
    ours = found(config, {"tokenizer.json": json.dumps(tokenizer).encode()})
    assert ours["pre"] == name
    assert ours["merges"] == theirs["merges"]
    assert ours["tokens"] == tokens
    assert ours["token_type"] == kinds


def begins(token: str, number: int) -> dict[str, Any]:
    special = {"SpecialToken": {"id": token, "type_id": 0}}
    texts = [{"Sequence": {"id": name, "type_id": i}} for i, name in enumerate("AB")]
    return {
        "type": "TemplateProcessing", "single": [special, texts[0]], "pair": [special, texts[0], special, texts[1]],
        "special_tokens": {token: {"id": token, "ids": [number], "tokens": [token]}},
    }  # fmt: skip


@pytest.mark.parametrize("name", ["llama-spm", "phi-3"])
def test_pieces_of_sentencepiece(name: str) -> None:
    theirs = fields(name)
    rows = list(zip(theirs["tokens"], theirs["scores"], theirs["token_type"], strict=True))
    data = b"".join(field(1, piece(*row)) for row in rows)
    config = made.config("LlamaForCausalLM", "llama", vocab_size=len(rows))
    ours = found(config, {"tokenizer.model": data})
    assert ours["tokens"] == theirs["tokens"]
    assert ours["scores"] == theirs["scores"]
    assert ours["token_type"] == [1 if kind == 4 else kind for kind in theirs["token_type"]]


def piece(token: str, score: float, kind: int) -> bytes:
    return field(1, token.encode()) + b"\x15" + struct.pack("<f", score) + b"\x18" + bytes([kind])


def field(number: int, data: bytes) -> bytes:
    size, head = len(data), bytearray()
    while size >= 0x80:
        head.append(size & 0x7F | 0x80)
        size >>= 7
    return bytes([number << 3 | 2, *head, size]) + data
