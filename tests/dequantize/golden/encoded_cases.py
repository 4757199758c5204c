"""Encoded weights of every kind: what a checkpoint would hold (tensors by name, a configuration), and the reader that
knows what it stands for."""

from typing import Final

from encoded_packed import PACKED  # type: ignore[import-not-found,unused-ignore]
from encoded_scaled import SCALED  # type: ignore[import-not-found,unused-ignore]

CASES: Final = (*SCALED, *PACKED)
