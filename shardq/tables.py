"""Tables that people write in TOML: every key is known and has a value of its kind, or the message says where not."""

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shardq.errors import BadOption

Kinds = tuple[type, ...]


def read_toml(path: Path) -> dict[str, Any]:
    """The table of a file. Raises BadOption with the line that is wrong."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise BadOption(f"{path} cannot be read: {error}") from error


def check_table(value: object, where: str, keys: Mapping[str, Kinds]) -> Mapping[str, Any]:
    """`value`, if it is a table of these keys, each of one of its kinds: True is no int, and an int is a float. Raises
    BadOption."""
    if not isinstance(value, Mapping):
        raise BadOption(f"{where}: expected a table, found {value!r:.60}")
    for key, found in value.items():
        if key not in keys:
            raise BadOption(f"{where}: unknown key {key!r}: expected one of {', '.join(keys)}")
        kinds = keys[key]
        if type(found) not in kinds and not (float in kinds and type(found) is int):
            names = " or ".join(_NAMES.get(kind, kind.__name__) for kind in kinds)
            raise BadOption(f"{where}: {key} = {found!r:.60}: expected {names}")
        if found == "":
            raise BadOption(f"{where}: {key} is empty: leave it out, or say what it is")
    return value


def check_texts(values: Sequence[object], where: str) -> tuple[str, ...]:
    """`values`, if all of them are strings that are not empty. Raises BadOption."""
    for value in values:
        if not isinstance(value, str) or not value:
            raise BadOption(f"{where}: expected strings, found {value!r:.60}")
    return tuple(str(value) for value in values)


_NAMES: Mapping[type, str] = {
    str: "a string", bool: "true or false", int: "a whole number", float: "a number", list: "a list", dict: "a table",
}  # fmt: skip
