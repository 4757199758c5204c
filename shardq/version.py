"""Versions that outputs carry."""

from importlib.metadata import PackageNotFoundError, version
from typing import Final


def _installed() -> str:
    try:
        return version("shardq")
    except PackageNotFoundError:  # run from a source tree that was never installed
        return "0+source"


VERSION: Final = _installed()
NUMERICS: Final = 1  # raised when the same recipe on the same source gives other bytes
