"""transformers as block mode uses it: models, and how their weights are named and converted."""

from typing import Any, Final

from shardq.tune.packages import import_torch, import_tuning_package

NEED: Final = "block mode"


def check_packages() -> None:
    """Raises MissingPackage unless all that block mode needs can be imported."""
    import_torch()
    import_whole()


def import_whole() -> Any:
    """The package, which has no types. Raises MissingPackage."""
    return import_tuning_package("transformers", NEED)


def import_part(name: str) -> Any:
    """A module of it. Raises MissingPackage, also where this version has none of that name."""
    return import_tuning_package(f"transformers.{name}", NEED)
