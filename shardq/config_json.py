"""Put one key into a JSON object without touching any other byte of its text."""

import json
from collections.abc import Collection
from typing import Any

from shardq.errors import SourceUnreadable


def set_key(text: str, key: str, value: object) -> str:
    """`text`, a JSON object, with `key` set to `value`: replaced where it stands, else added at the end.

    All other bytes stay as they are: loaders read keys that other tools would rename. Raises SourceUnreadable when
    `text` is not a JSON object.
    """
    members, end = _members(text)
    indent = _indent(text)
    block = _nested(value, indent)
    for name, begin, stop in members:
        if name == key:
            return text[:begin] + block + text[stop:]
    if not members:
        brace = text.index("{")
        return f"{text[: brace + 1]}\n{indent}{json.dumps(key)}: {block}\n{text[end:]}"
    last = members[-1][2]
    return f"{text[:last]},\n{indent}{json.dumps(key)}: {block}{text[last:]}"


def set_in(text: str, part: str, key: str, value: object) -> str:
    """The same within an object `part` of it; no change where there is none. Raises SourceUnreadable."""
    for name, begin, stop in _members(text)[0]:
        if name == part and text[begin] == "{":
            return text[:begin] + set_key(text[begin:stop], key, value) + text[stop:]
    return text


def drop_keys(text: str, keys: Collection[str]) -> str:
    """`text`, a JSON object, without these keys, at any depth of objects; all other bytes stay as they are but for the
    comma before or behind. Raises SourceUnreadable when `text` is not a JSON object."""
    members, _ = _members(text)
    for name, begin, stop in reversed(members):
        if name in keys:
            text = _without(text, name)
        elif text[begin] == "{":
            text = text[:begin] + drop_keys(text[begin:stop], keys) + text[stop:]
    return text


def _without(text: str, key: str) -> str:
    """`text` without one of its members."""
    members, end = _members(text)
    number = next(i for i, (name, _, _) in enumerate(members) if name == key)
    before = members[number - 1][2] if number else text.index("{") + 1
    if number == 0 and len(members) > 1:  # the next one takes its place, white space before the key included
        return text[:before] + text[_skip(text, members[0][2]) + 1 :]
    return text[:before] + (text[members[number][2] :] if number else text[end:])


def _members(text: str) -> tuple[list[tuple[str, int, int]], int]:
    """(key, first and last+1 character of its value) of a top-level object, and where its closing brace is."""
    decoder = json.JSONDecoder()
    at = _skip(text, 0)
    members: list[tuple[str, int, int]] = []
    if text[at : at + 1] != "{":
        raise SourceUnreadable("config.json is not a JSON object: it must start with {")
    try:
        at = _skip(text, at + 1)
        while text[at] != "}":
            name, at = decoder.raw_decode(text, at)
            begin = _skip(text, _skip(text, at) + 1)
            _, stop = decoder.raw_decode(text, begin)
            members.append((name, begin, stop))
            at = _skip(text, stop)
            if text[at] == ",":
                at = _skip(text, at + 1)
    except (ValueError, IndexError) as e:
        raise SourceUnreadable(f"config.json is not a JSON object: {e}") from e
    return members, at


def _skip(text: str, at: int) -> int:
    while at < len(text) and text[at] in " \t\r\n":
        at += 1
    return at


def _indent(text: str) -> str:
    """The white space before the first key, two spaces if it stands on the first line."""
    brace = text.index("{") if "{" in text else 0
    line = text[brace + 1 :].partition("\n")[2]
    return line[: len(line) - len(line.lstrip(" \t"))] or "  "


def _nested(value: object, indent: str) -> str:
    text = json.dumps(value, indent=indent if indent.strip(" ") == "" else "  ", ensure_ascii=False)
    return text.replace("\n", "\n" + indent)


def dump(value: Any) -> bytes:
    """JSON as the other files of a checkpoint have it: two spaces, UTF-8, a final newline."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
