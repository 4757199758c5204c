"""Metadata while it is collected."""

from collections.abc import Sequence
from typing import Final

from shardq.errors import UnsupportedSource
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

    def text(self, key: str, value: object) -> None:
        """A string; an empty one is left out. Raises UnsupportedSource."""
        if not isinstance(value, str):
            raise _wrong(key, value, "text")
        if value:
            self._set(key, "string", value)

    def u32(self, key: str, value: object) -> None:
        """A whole number; a float that is one, too. Raises UnsupportedSource."""
        self._set(key, "u32", _whole(key, value))

    def i32(self, key: str, value: object) -> None:
        """The same, which may be negative."""
        self._set(key, "i32", _whole(key, value, -(1 << 31)))

    def f32(self, key: str, value: object) -> None:
        """A number, rounded to the nearest f32 where it is written. Raises UnsupportedSource."""
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise _wrong(key, value, "a number")
        self._set(key, "f32", float(value))

    def flag(self, key: str, value: object) -> None:
        """Yes or no. Raises UnsupportedSource."""
        if not isinstance(value, bool):
            raise _wrong(key, value, "true or false")
        self._set(key, "bool", value)

    def array(self, key: str, values: Sequence[Scalar]) -> None:
        """An array of values of one type; an empty one is left out. Raises UnsupportedSource."""
        if not values:
            return
        kinds = {_kind_of(sort) for sort in set(map(type, values))}  # of a few types, not of each token
        if len(kinds) > 1 or "" in kinds:
            raise _wrong(key, values, "values of one type")
        self._set(key, kinds.pop(), tuple(values))

    def _set(self, key: str, kind: str, value: Scalar | tuple[Scalar, ...]) -> None:
        full = key.replace("{arch}", self._arch)
        self._pairs[full] = KeyValue(full, kind, value)


def _kind_of(sort: type) -> str:
    return next((name for known, name in ARRAY_TYPES if issubclass(sort, known)), "")


def _whole(key: str, value: object, least: int = 0) -> int:
    if isinstance(value, bool) or not isinstance(value, int | float) or value != int(value):
        raise _wrong(key, value, "a whole number")
    if not least <= value < (1 << 32) + least:
        raise _wrong(key, value, f"a number of 32 bits from {least}")
    return int(value)


def _wrong(key: str, value: object, expected: str) -> UnsupportedSource:
    name = key.replace("{arch}.", "")
    return UnsupportedSource(f"side files: {name} of GGUF would be {str(value)[:80]!a}, expected {expected}")
