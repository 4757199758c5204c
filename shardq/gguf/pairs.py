"""Metadata while it is collected."""

from collections.abc import Sequence
from typing import Final

from shardq.files.gguf import KeyValue, Scalar

ARRAY_TYPES: Final = ((bool, "bool"), (int, "i32"), (float, "f32"), (str, "string"))


class Pairs:
    """Pairs in order. As in gguf 0.19.0's `GGUFWriter`: a key set again keeps its place, nothing empty is written."""

    def __init__(self, arch: str) -> None:
        self._arch = arch
        self._pairs: dict[str, KeyValue] = {}

    def done(self) -> tuple[KeyValue, ...]:
        """What was collected."""
        return tuple(self._pairs.values())

    def text(self, key: str, value: str) -> None:
        """A string; an empty one is left out."""
        if value:
            self._set(key, "string", value)

    def u32(self, key: str, value: int) -> None:
        self._set(key, "u32", int(value))

    def i32(self, key: str, value: int) -> None:
        self._set(key, "i32", int(value))

    def f32(self, key: str, value: float) -> None:
        """A number, rounded to the nearest f32 where it is written."""
        self._set(key, "f32", float(value))

    def flag(self, key: str, value: bool) -> None:
        self._set(key, "bool", bool(value))

    def array(self, key: str, values: Sequence[Scalar]) -> None:
        """An array of the type of its first element; an empty one is left out."""
        if values:
            kind = next(name for sort, name in ARRAY_TYPES if isinstance(values[0], sort))
            self._set(key, kind, tuple(values))

    def _set(self, key: str, kind: str, value: Scalar | tuple[Scalar, ...]) -> None:
        full = key.replace("{arch}", self._arch)
        self._pairs[full] = KeyValue(full, kind, value)
