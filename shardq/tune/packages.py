"""The packages that block mode needs and nothing else does, imported where they are used."""

from importlib import import_module
from typing import Any

from shardq.errors import MissingPackage


def import_torch() -> Any:
    """The package torch. Raises MissingPackage."""
    return import_tuning_package("torch", "block mode")


def import_transformers(need: str) -> Any:
    """The package transformers; `need` says what for. Raises MissingPackage."""
    return import_tuning_package("transformers", need)


def import_tuning_package(name: str, need: str) -> Any:
    """A package of the extra shardq[tune]. Raises MissingPackage."""
    try:
        return import_module(name)
    except ImportError as error:
        raise MissingPackage(f"{need}: package {name} is not there ({error}); install shardq[tune]") from error
