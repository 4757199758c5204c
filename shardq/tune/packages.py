"""The packages that block mode needs and nothing else does."""

from importlib import import_module
from typing import Any, Final

from shardq.errors import MissingPackage

NEEDED: Final = ("torch", "transformers")


def check_packages() -> None:
    """Raises MissingPackage unless all that block mode needs can be imported."""
    for name in NEEDED:
        _import(name)


def import_transformers() -> Any:
    """The package transformers, which has no types. Raises MissingPackage."""
    return _import("transformers")


def import_part(name: str) -> Any:
    """A module of transformers. Raises MissingPackage, also where this version has none of that name."""
    return _import(f"transformers.{name}")


def _import(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise MissingPackage(f"block mode: {name} is not there ({error}); install shardq[tune]") from error
