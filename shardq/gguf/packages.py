"""The two packages that GGUF needs and nothing else does, imported where they are used."""

from typing import Any

from shardq.errors import MissingPackage


def import_gguf() -> Any:
    """The package gguf: names of tensors, and the grammar of model names. Raises MissingPackage."""
    try:
        import gguf
    except ImportError as error:
        raise MissingPackage(_missing("gguf", "names of GGUF tensors", error)) from error
    return gguf


def import_tokenizers() -> Any:
    """The package tokenizers: it encodes the text by which a pre-tokenizer is told. Raises MissingPackage."""
    try:
        import tokenizers
    except ImportError as error:
        raise MissingPackage(_missing("tokenizers", "the vocabulary of a tokenizer.json", error)) from error
    return tokenizers


def _missing(name: str, need: str, error: ImportError) -> str:
    return f"{need}: package {name} cannot be imported ({error}); install shardq[gguf]"
