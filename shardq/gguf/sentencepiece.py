"""SentencePiece: the vocabulary of a tokenizer.model, and of a tokenizer.json of that kind.

Source: llama.cpp as in llama-cpp-python 0.3.36, `TextModel._create_vocab_sentencepiece`, `Phi3MiniModel.set_vocab`, and
gguf-py `LlamaHfVocab`; for the file sentencepiece_model.proto of sentencepiece 0.2.3.
"""

import re
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from shardq.errors import SourceUnreadable, UnsupportedSource
from shardq.gguf.model_files import ADDED_TOKENS, SENTENCEPIECE, TOKENIZER, TOKENIZER_CONFIG, ModelFiles
from shardq.gguf.pairs import Pairs
from shardq.gguf.parameters import Parameters
from shardq.gguf.special_tokens import KINDS, read_special_tokens
from shardq.gguf.token_types import BYTE, CONTROL, NORMAL, SPACE, UNUSED, USER_DEFINED, looks_special

ABSENT: Final = -10000.0  # score of an id that no file names
ADDED: Final = -1000.0  # of one that was added to the model later
LLAMA_CLASSES: Final = ("LlamaTokenizer", "LlamaTokenizerFast")
LLAMA_SPECIAL: Final = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}  # transformers 5.23.0
_WIRE: Final = {1: 8, 5: 4}  # bytes of the wire types of fixed size
_BYTE_TOKEN: Final = re.compile(r"<0x[0-9A-Fa-f]{2}>")


@dataclass(slots=True)
class Pieces:
    """A vocabulary by id."""

    tokens: list[str]
    scores: list[float]
    types: list[int]

    def put(self, number: int, token: str, score: float, kind: int) -> None:
        self.tokens[number], self.scores[number], self.types[number] = token, score, kind


def add_pieces(pairs: Pairs, model: ModelFiles, pieces: Pieces) -> None:
    """Add a vocabulary and the special tokens. Raises SourceUnreadable."""
    pairs.text("tokenizer.ggml.model", "llama")
    pairs.text("tokenizer.ggml.pre", "default")
    pairs.array("tokenizer.ggml.tokens", tuple(pieces.tokens))
    pairs.array("tokenizer.ggml.scores", tuple(pieces.scores))
    pairs.array("tokenizer.ggml.token_type", tuple(pieces.types))
    read_special_tokens(model, len(pieces.tokens)).add_to(pairs)


def read_pieces(model: ModelFiles, parameters: Parameters, phi3: bool = False) -> Pieces:
    """The vocabulary of tokenizer.model and what was added to it; `phi3` for that architecture's own rules.

    Raises SourceUnreadable, UnsupportedSource.
    """
    own = list(parse_model(model.files.get(SENTENCEPIECE, b"")))
    count = parameters.tokens if parameters.find("vocab_size") else len(own)
    found = Pieces([f"[PAD{i}]" for i in range(count)], [ABSENT] * count, [UNUSED] * count)
    for number, (token, score, kind) in enumerate(own[:count]):
        found.put(number, token, score, NORMAL if kind == USER_DEFINED else kind)
    for token, number in (model.table(ADDED_TOKENS) or {}).items():
        if number < count:
            found.put(number, token, ADDED, USER_DEFINED)
    decoder = (model.table(TOKENIZER_CONFIG) or {}).get("added_tokens_decoder", {})
    _put_added(found, ((int(number), token) for number, token in decoder.items()), looks=not phi3)
    if phi3:
        added = (model.table(TOKENIZER) or {}).get("added_tokens", [])
        _put_added(found, ((int(token["id"]), token) for token in added), looks=False)
    return found


def _put_added(found: Pieces, tokens: Iterable[tuple[int, Mapping[str, Any]]], looks: bool) -> None:
    for number, token in tokens:
        if number >= len(found.tokens):
            continue
        text = token["content"]
        if token.get("special") or (looks and looks_special(text)):
            found.put(number, text, ADDED, CONTROL)
        else:
            found.put(number, text.replace(SPACE, " ") if looks else text, ADDED, USER_DEFINED)


def has_json_pieces(model: ModelFiles) -> bool:
    """Whether tokenizer.json is SentencePiece in that form: BPE with bytes for what is not in it."""
    tokenizer = model.table(TOKENIZER) or {}
    own, decoder = tokenizer.get("model") or {}, tokenizer.get("decoder") or {}
    return own.get("type") == "BPE" and bool(own.get("byte_fallback")) and decoder.get("type") == "Sequence"


def read_json_pieces(model: ModelFiles) -> Pieces:
    """Its vocabulary: scores are not known there, and all alike. Raises UnsupportedSource."""
    tokenizer = model.table(TOKENIZER) or {}
    vocabulary: dict[str, int] = tokenizer["model"]["vocab"]
    special = _special_contents(model)
    by_id = {number: token for token, number in vocabulary.items()}
    found = Pieces([], [], [])
    for number in range(len(by_id)):
        if number not in by_id:
            raise UnsupportedSource(f"{TOKENIZER}: no token has id {number}, expected all from 0 to {len(by_id) - 1}")
        token = by_id[number]
        kind = BYTE if _BYTE_TOKEN.fullmatch(token) else CONTROL if token in special else NORMAL
        _append(found, token, kind)
    added = sorted(tokenizer.get("added_tokens", []), key=lambda token: int(token["id"]))
    for token in added:
        if token["id"] >= len(by_id):
            _append(found, token["content"], CONTROL if token["content"] in special else USER_DEFINED)
    return found


def _append(found: Pieces, token: str, kind: int) -> None:
    found.tokens.append(token)
    found.scores.append(ADDED)
    found.types.append(kind)


def _special_contents(model: ModelFiles) -> set[str]:
    """The tokens that transformers calls special: those that tokenizer_config.json names, and its class by itself."""
    config = model.table(TOKENIZER_CONFIG) or {}
    if config.get("tokenizer_class") in LLAMA_CLASSES:
        config = {**LLAMA_SPECIAL, **config}
    entries = [config.get(f"{kind}_token") for kind in KINDS]
    for key in ("additional_special_tokens", "extra_special_tokens"):
        more = config.get(key) or []
        entries += more.values() if isinstance(more, Mapping) else more
    contents = (entry.get("content") if isinstance(entry, Mapping) else entry for entry in entries)
    return {content for content in contents if isinstance(content, str)}


def parse_model(data: bytes) -> Iterator[tuple[str, float, int]]:
    """Piece, score and type of each token of a tokenizer.model, by id. Raises SourceUnreadable."""
    try:
        for number, piece in _fields(data):
            if number == 1 and isinstance(piece, bytes):
                token, score, kind = "", 0.0, NORMAL
                for inner, value in _fields(piece):
                    if inner == 1 and isinstance(value, bytes):
                        token = value.decode("utf-8")
                    elif inner == 2 and isinstance(value, bytes):
                        score = struct.unpack("<f", value)[0]
                    elif inner == 3 and isinstance(value, int):
                        kind = value
                yield token, score, kind
    except (IndexError, UnicodeDecodeError, struct.error) as error:
        raise SourceUnreadable(f"{SENTENCEPIECE} is no SentencePiece model: {error}") from error


def _fields(data: bytes) -> Iterator[tuple[int, bytes | int]]:
    """Number and content of each field of a message in protobuf's wire format."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        wire = tag & 7
        if wire == 0:
            value, at = _varint(data, at)
            yield tag >> 3, value
            continue
        if wire == 2:
            size, at = _varint(data, at)
        elif wire in _WIRE:
            size = _WIRE[wire]
        else:
            raise IndexError(f"wire type {wire} at byte {at}")
        if at + size > len(data):
            raise IndexError(f"a field of {size} bytes at byte {at} of {len(data)}")
        yield tag >> 3, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
        if shift > 63:
            raise IndexError(f"a number of more than 64 bits before byte {at}")
