"""Which of a model's tokenizer files GGUF takes its vocabulary from, and what single architectures add to it.

Source: llama.cpp as in llama-cpp-python 0.3.36, `set_vocab` of the classes that architectures.py has.
"""

from collections.abc import Mapping
from typing import Final

from shardq.errors import UnsupportedSource
from shardq.gguf.architectures import Vocabulary
from shardq.gguf.bpe import add_bpe
from shardq.gguf.model_files import SENTENCEPIECE, TEKKEN, TOKENIZER, TOKENIZER_CONFIG, ModelFiles
from shardq.gguf.pairs import Pairs
from shardq.gguf.parameters import Parameters
from shardq.gguf.sentencepiece import add_pieces, has_json_pieces, read_json_pieces, read_pieces

SPACE_PREFIX: Final = "tokenizer.ggml.add_space_prefix"
CODE_LLAMA_TOKENS: Final = 32016
CODE_LLAMA_EOT: Final = 32010
GRANITE_TOKENS: Final = 49152  # of SmolLM too
GLM: Final[Mapping[str, str]] = {
    "bos": "[gMASK]", "eot": "<|user|>", "unk": "<|endoftext|>", "eom": "<|observation|>",
}  # fmt: skip


def add_vocabulary(pairs: Pairs, model: ModelFiles, parameters: Parameters, kind: Vocabulary, pre: str | None) -> None:
    """Add it. Raises UnsupportedSource, SourceUnreadable, MissingPackage."""
    has_model = SENTENCEPIECE in model.files
    if kind == "llama":
        _add_llama(pairs, model, parameters, pre)
    elif kind == "glm":
        add_bpe(pairs, model, parameters, pre, GLM)
    elif kind == "phi3":
        _add_phi3(pairs, model, parameters, pre)
    elif kind in ("gemma2", "gemma3") and (has_model or kind == "gemma2"):
        _need(model, SENTENCEPIECE)
        add_pieces(pairs, model, read_pieces(model, parameters))
        pairs.flag(SPACE_PREFIX, False)
    elif kind == "either" and has_model:
        add_pieces(pairs, model, read_pieces(model, parameters))
    else:
        add_bpe(pairs, model, parameters, pre)


def count_token_rows(model: ModelFiles, parameters: Parameters) -> int:
    """Rows of Gemma 3's embedding that its converter keeps. Raises SourceUnreadable, UnsupportedSource."""
    if SENTENCEPIECE in model.files:
        return len(read_pieces(model, parameters).tokens)
    tokenizer = model.table(TOKENIZER)
    if tokenizer is None:
        raise UnsupportedSource(f"{model.name} has neither {SENTENCEPIECE} nor {TOKENIZER}")
    return len(tokenizer["model"]["vocab"]) + len(tokenizer["added_tokens"])


def _add_llama(pairs: Pairs, model: ModelFiles, parameters: Parameters, pre: str | None) -> None:
    if TEKKEN in model.files and TOKENIZER not in model.files:
        raise UnsupportedSource(f"{model.name} has its vocabulary in {TEKKEN} alone: {TOKENIZER} is needed for GGUF")
    prefix = (model.table(TOKENIZER_CONFIG) or {}).get("add_prefix_space")
    if prefix is not None:
        pairs.flag(SPACE_PREFIX, prefix)
    if SENTENCEPIECE in model.files:
        add_pieces(pairs, model, read_pieces(model, parameters))
    elif has_json_pieces(model):
        add_pieces(pairs, model, read_json_pieces(model))
    else:
        add_bpe(pairs, model, parameters, pre)
    size = parameters.find("vocab_size")
    if size == CODE_LLAMA_TOKENS:
        pairs.u32("tokenizer.ggml.eot_token_id", CODE_LLAMA_EOT)
    if size == GRANITE_TOKENS:
        pairs.flag("tokenizer.ggml.add_bos_token", False)


def _add_phi3(pairs: Pairs, model: ModelFiles, parameters: Parameters, pre: str | None) -> None:
    if (model.table(TOKENIZER_CONFIG) or {}).get("tokenizer_class") == "GPT2Tokenizer":
        add_bpe(pairs, model, parameters, pre)
        return
    _need(model, SENTENCEPIECE)
    add_pieces(pairs, model, read_pieces(model, parameters, phi3=True))


def _need(model: ModelFiles, name: str) -> None:
    if name not in model.files:
        raise UnsupportedSource(f"{model.name} has no {name}: GGUF takes the vocabulary of its architecture from there")
