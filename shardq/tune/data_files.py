"""Calibration texts from files: .json, .jsonl, .txt, .md, or a folder of these.

Source: AutoRound 0.16.1, `calib_dataset.get_local_dataset`, for .json and .jsonl: a list, or an object of which the
values count; each entry a text, an object with one member, or one with `text`. Beyond it: lists of ids, `input_ids`
(there refused), `messages`, text files and folders.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from shardq.errors import SourceUnreadable
from shardq.importance_files import short

TABLES: Final = (".json", ".jsonl")  # each entry is a sample
TEXTS: Final = (".txt", ".md")  # running text
PIECE_CHARACTERS: Final = 1 << 18  # of running text; it is cut at ends of lines, so that not all must be encoded


@dataclass(frozen=True, slots=True)
class Running:
    """Text without borders between samples: any window of it is one."""

    text: str


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages, each with a role and content."""

    messages: tuple[Mapping[str, Any], ...]

    def text(self) -> str:
        """The contents alone, without anything between them, as AutoRound joins those of ultrachat_200k."""
        return "".join(str(m.get("content", "")) for m in self.messages)


Entry = str | tuple[int, ...] | Running | Conversation


def is_local(name: str) -> bool:
    """True for a path: of something that exists, or with an ending that no set of the Hub has."""
    return os.path.exists(name) or name.endswith((*TABLES, *TEXTS)) or name.startswith((".", "/", "~"))


def read_local(path: str) -> list[Entry]:
    """All entries of a file or folder, in the order of the file, files by name. Raises SourceUnreadable."""
    path = os.path.expanduser(path)
    label = os.path.basename(os.path.normpath(path))
    if not os.path.exists(path):
        raise SourceUnreadable(f"dataset {label}: no such file or folder; known endings are {_endings()}")
    names = [path] if not os.path.isdir(path) else sorted(_walk(path))
    if not names:
        raise SourceUnreadable(f"dataset {label}: the folder has no {_endings()}")
    return [entry for name in names for entry in _read_file(name)]


def read_entry(value: object, where: str) -> Entry:
    """A sample from what JSON or a caller holds. Raises SourceUnreadable; `where` names it."""
    if isinstance(value, Mapping):
        value = _member(value, where)
    if isinstance(value, str):
        return value.rstrip()  # as AutoRound does
    if isinstance(value, Sequence) and not isinstance(value, bytes):
        if value and all(isinstance(v, Mapping) for v in value):
            return _conversation(value, where)
        if all(isinstance(v, int) and not isinstance(v, bool) and v >= 0 for v in value):
            return tuple(value)
    raise SourceUnreadable(f"{where}: expected a text, ids or messages, found {short(value)}")


def _member(value: Mapping[Any, Any], where: str) -> Any:
    """What of an object is the sample."""
    if len(value) == 1:
        return next(iter(value.values()))
    for key in ("text", "input_ids", "messages"):
        if key in value:
            return value[key]
    raise SourceUnreadable(f"{where}: expected one member, or text, input_ids or messages; found {short(list(value))}")


def _conversation(messages: Sequence[Mapping[str, Any]], where: str) -> Conversation:
    for m in messages:
        if not (isinstance(m.get("role"), str) and isinstance(m.get("content"), str)):
            raise SourceUnreadable(f"{where}: expected messages with role and content, found {short(m)}")
    return Conversation(tuple(messages))


def _walk(folder: str) -> Iterator[str]:
    for parent, _, names in os.walk(folder):
        yield from (os.path.join(parent, n) for n in names if n.endswith((*TABLES, *TEXTS)) and not n.startswith("."))


def _read_file(path: str) -> list[Entry]:
    label = os.path.basename(path)
    if not label.endswith((*TABLES, *TEXTS)):
        raise SourceUnreadable(f"dataset {label}: known endings are {_endings()}")
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"not UTF-8: {error}"
        raise SourceUnreadable(f"dataset {label}: {reason}") from error
    if label.endswith(TEXTS):
        return [Running(piece) for piece in cut_text(text)]
    numbered = enumerate(text.split("\n"), 1) if label.endswith(".jsonl") else [(0, text)]
    values: list[tuple[str, object]] = []
    for number, line in numbered:
        where = f"dataset {label}" + (f", line {number}" if number else "")
        if number and not line.strip():
            continue
        try:
            values.append((where, json.loads(line)))
        except (ValueError, RecursionError) as error:
            raise SourceUnreadable(f"{where}: not JSON: {error}") from error
    if label.endswith(".json"):
        values = _members(values[0][1], f"dataset {label}")
    return [read_entry(value, where) for where, value in values]


def _members(value: object, where: str) -> list[tuple[str, object]]:
    """The entries of a .json file."""
    if isinstance(value, dict):
        return [(f"{where}, member {short(key)}", member) for key, member in value.items()]
    if isinstance(value, list):
        return [(f"{where}, entry {number}", member) for number, member in enumerate(value)]
    raise SourceUnreadable(f"{where}: expected a list or an object, found {short(value)}")


def cut_text(text: str) -> Iterator[str]:
    """Pieces of about PIECE_CHARACTERS that end with a line where there is one; together they are the text."""
    begin = 0
    while begin < len(text):
        end = begin + PIECE_CHARACTERS
        if end < len(text):
            end = text.rfind("\n", begin, end) + 1 or end
        yield text[begin:end]
        begin = end


def _endings() -> str:
    return ", ".join((*TABLES, *TEXTS))
