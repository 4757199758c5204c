"""All metadata of a GGUF file, as llama.cpp's converter and then its quantizer write it."""

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Final

from shardq.errors import SourceUnreadable, UnsupportedSource
from shardq.files.gguf import KeyValue
from shardq.gguf.architectures import Architecture, find_architecture
from shardq.gguf.general import add_general
from shardq.gguf.mapping import map_tensors
from shardq.gguf.model_files import CARD, MODULES, ModelFiles
from shardq.gguf.pairs import Pairs
from shardq.gguf.parameters import read_parameters
from shardq.gguf.tensors import OutputTensor, SourceTensor
from shardq.gguf.vocabulary import add_vocabulary, count_token_rows

FILE_TYPE: Final = "general.file_type"
COUNTED: Final = "gemma3"  # the vocabulary whose tokens have rows of the embedding, and nothing else has
QUANTIZATION: Final = ("general.quantization_version", 2)


def find_tensors(model: ModelFiles, shards: Iterable[Iterable[SourceTensor]]) -> tuple[OutputTensor, ...]:
    """The tensors of the file, in the converter's order: shard by shard, and by source name in each.

    Raises UnsupportedSource, CheckpointIncomplete, SourceUnreadable, MissingPackage.
    """
    ordered = [source for shard in shards for source in sorted(shard, key=lambda source: source.name)]
    with _reading(model):
        config = model.config()
        arch, parameters = find_architecture(config), read_parameters(config)
        if arch.vocabulary == COUNTED:
            parameters = replace(parameters, token_rows=count_token_rows(model, parameters))
        return map_tensors(arch, parameters, ordered)


def counts_tokens(model: ModelFiles) -> bool:
    """True if `find_tensors` needs the files of the tokenizer, else config.json alone. Raises UnsupportedSource,
    SourceUnreadable."""
    with _reading(model):
        return find_architecture(model.config()).vocabulary == COUNTED


def find_metadata(
    model: ModelFiles, tensors: Sequence[OutputTensor], file_type: int, tokenizer_pre: str | None = None
) -> tuple[KeyValue, ...]:
    """The metadata, in the converter's order, for `tensors` of `find_tensors` and a number of ggml's table of file
    types; `tokenizer_pre` is llama.cpp's name of the pre-tokenizer where it is not to be found out.

    Raises UnsupportedSource for an architecture, a pre-tokenizer or a value that GGUF has no form for, SourceUnreadable
    for damaged side files, MissingPackage without gguf, or without tokenizers where they are needed.
    """
    with _reading(model):
        config = model.config()
        arch, parameters = find_architecture(config), read_parameters(config)
        _check_task(model, arch)
        pairs = Pairs(arch.name)
        pairs.text("general.architecture", arch.name)
        if arch.add_first:
            arch.add_first(pairs, parameters)
        add_general(pairs, model, tensors)
        arch.add_pairs(pairs, parameters, arch.blocks(parameters, (t.name for t in tensors)), file_type)
        pairs.u32(*QUANTIZATION)
        add_vocabulary(pairs, model, parameters, arch.vocabulary, tokenizer_pre)
        return pairs.done()


@contextmanager
def _reading(model: ModelFiles) -> Iterator[None]:
    """What others wrote may have any form: a list where a table belongs is their mistake. Raises SourceUnreadable."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        what = " ".join(repr(error).split())[:300]
        raise SourceUnreadable(f"config or tokenizer files of {model.name} are not as expected: {what}") from error


def _check_task(model: ModelFiles, arch: Architecture) -> None:
    """Models that embed, rank or draft have keys and tensors of their own, which are not written yet.

    Raises UnsupportedSource.
    """
    config = model.config()
    card = (model.text(CARD) or "").lower()
    modules = json.loads(model.files.get(MODULES, b"[]"))
    hints = [model.name, str(config.get("_name_or_path", ""))]
    ranks = "# qwen3-reranker" in card or any("qwen3-reranker" in hint.lower() for hint in hints)
    for task, found in (
        ("embeds", any(str(module.get("type", "")).endswith("Pooling") for module in modules)),
        ("ranks", arch.name == "qwen3" and ranks),
        ("drafts", "draft_vocab_size" in config),
    ):
        if found:
            raise UnsupportedSource(f"{model.name} {task}: GGUF is written for models that generate text alone")


def order_quantized(pairs: Iterable[KeyValue]) -> tuple[KeyValue, ...]:
    """The same as llama.cpp's quantizer writes it: these two at the end.

    Source: llama.cpp as in llama-cpp-python 0.3.36, `llama_model_quantize_impl`.
    """
    own = {pair.key: pair for pair in pairs}
    last = [own.pop(key) for key in (QUANTIZATION[0], FILE_TYPE)]
    return (*own.values(), *last)
