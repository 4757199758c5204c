"""The two packages that GGUF needs and nothing else does, imported where they are used."""

from importlib import import_module
from typing import Any

from shardq.errors import MissingPackage


def import_gguf() -> Any:
    """The package gguf: names of tensors, and the grammar of model names. Raises MissingPackage."""
    return _import("gguf", "names of GGUF tensors")


def import_tokenizers() -> Any:
    """The package tokenizers: it encodes the text by which a pre-tokenizer is told. Raises MissingPackage."""
    return _import("tokenizers", "the vocabulary of a tokenizer.json")


def _import(name: str, need: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise MissingPackage(f"{need}: package {name} is not there ({error}); install shardq[gguf]") from error
