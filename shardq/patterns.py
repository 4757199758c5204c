"""Patterns over module names, and the rules for single layers that are keyed by them.

Two dialects, because users bring both:

shardq
    `model.layers.0.mlp.down_proj`  that module and no other; a `.weight` at the end is taken off
    `model.layers.*.mlp.*_proj`     a glob on whole segments: `*` (any characters) and `?` (one)
                                    never cross a dot; a segment `**` is any number of segments
    `re:.*down_proj`                a regular expression that must match from the start of the name
                                    but need not reach its end (re.match): what `re:` means to
                                    compressed-tensors, so ignore lists mean the same to both
auto-round (0.16.1: its layer_config keys and ignore lists)
    a plain string hits every module whose name contains it. With one of `.*  ^ $ | ( ) [ ] ? +` in
    it, it is a regular expression that may hit anywhere; a dot in it is a plain dot unless `*`
    follows. A string that ends in `.<digits>` gets a dot added, so that `layers.1` does not hit
    `layers.10`. The full name of a module always hits it.
"""

import functools
import json
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from shardq.errors import BadOption

Dialect = Literal["shardq", "auto-round"]
Kind = Literal["exact", "glob", "regex", "search", "substring"]

KEEP_BITS = 16  # a rule with this many bits keeps its layers as they are

_AUTO_ROUND_TOKENS = (".*", "^", "$", "|", "(", ")", "[", "]", "?", "+")
_RULE_TYPES: Mapping[str, type] = {"bits": int, "group_size": int, "scheme": str, "sym": bool}


@dataclass(frozen=True, slots=True)
class Pattern:
    """A test on module names; made by parse_pattern."""

    text: str  # as the user wrote it, for messages
    kind: Kind
    body: str  # a name, a part of names, or a regular expression, after `kind`

    def matches(self, module: str) -> bool:
        """True if the pattern hits the module of this name (without `.weight`)."""
        match self.kind:
            case "exact":
                return module == self.body
            case "glob":
                return _compile(self.body).fullmatch(f"{module}.") is not None
            case "regex":
                return _compile(self.body).match(module) is not None
            case "search":
                return module == self.text or _compile(self.body).search(module) is not None
            case "substring":
                return module == self.text or self.body in module


@dataclass(frozen=True, slots=True)
class LayerRule:
    """What the user wants for the modules that a pattern hits; None: as the default scheme says."""

    pattern: Pattern
    bits: int | None  # 2..8, or 16: keep
    group_size: int | None  # columns; -1: one group per row
    sym: bool | None
    scheme: str | None  # a scheme's name, not yet checked

    @property
    def keeps(self) -> bool:
        """True if the modules stay as they are."""
        return self.bits == KEEP_BITS


def parse_pattern(text: str, dialect: Dialect) -> Pattern:
    """A pattern from what the user wrote; BadOption if it is empty or no valid expression."""
    if not text.strip() or text == "re:":
        raise BadOption(f"pattern {text!r} is empty: give a module name, a glob or re:EXPRESSION")
    pattern = _parse_shardq(text) if dialect == "shardq" else _parse_auto_round(text)
    if pattern.kind in ("regex", "search"):
        try:
            _compile(pattern.body)
        except re.error as error:
            raise BadOption(f"pattern {text!r} is no valid regular expression ({error}): correct it") from error
    return pattern


def _parse_shardq(text: str) -> Pattern:
    if text.startswith("re:"):
        return Pattern(text, "regex", text.removeprefix("re:"))
    name = text.removesuffix(".weight")
    if "*" in name or "?" in name:
        return Pattern(text, "glob", "".join(_glob_segment(s) for s in name.split(".")))
    return Pattern(text, "exact", name)


def _glob_segment(segment: str) -> str:
    """Expression for one segment and the dot behind it; the module's name gets a dot at its end."""
    if segment == "**":
        return r"(?:[^.]+\.)*"
    return re.escape(segment).replace(r"\*", "[^.]*").replace(r"\?", "[^.]") + r"\."


def _parse_auto_round(text: str) -> Pattern:
    body = f"{text}." if re.search(r"\.\d+$", text) else text
    if any(token in body for token in _AUTO_ROUND_TOKENS):
        return Pattern(text, "search", re.sub(r"\.(?!\*)", r"\\.", body))
    return Pattern(text, "substring", body)


@functools.cache
def _compile(expression: str) -> re.Pattern[str]:
    return re.compile(expression)


# --- rules for single layers -----------------------------------------------------------------


def parse_layer_config(source: str | Path | Mapping[str, object], dialect: Dialect) -> tuple[LayerRule, ...]:
    """Rules in the order given, from JSON text, the path of a .json or .toml file, or a mapping.

    The form is {pattern: {"bits": int, "group_size": int, "sym": bool, "scheme": str}}, every key
    optional, or {pattern: "W8A16"} for a scheme alone. BadOption if the file cannot be read, for a
    key that is unknown or given twice, for a wrong value, and for a rule that sets nothing.
    """
    table = source if isinstance(source, Mapping) else _read_table(source)
    return tuple(_parse_rule(text, values, dialect) for text, values in table.items())


def _read_table(source: str | Path) -> Mapping[str, object]:
    if isinstance(source, str) and source.lstrip().startswith("{"):
        return _parse_json(source, "the text given")
    path = Path(source)
    if path.suffix not in (".json", ".toml"):
        raise BadOption(f"layer config {str(source)!r} is neither JSON text ({{...}}) nor a .json or .toml file")
    try:
        text = path.read_text(encoding="utf-8")
        return tomllib.loads(text) if path.suffix == ".toml" else _parse_json(text, str(path))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise BadOption(f"layer config {str(path)!r} cannot be read: {error}") from error


def _parse_json(text: str, where: str) -> Mapping[str, object]:
    try:
        table = json.loads(text, object_pairs_hook=_without_duplicates)
    except (json.JSONDecodeError, RecursionError) as error:
        raise BadOption(f"layer config, {where}: no valid JSON: {error}") from error
    if not isinstance(table, dict):
        raise BadOption(f"layer config, {where}: expected {{pattern: rule}}, found {table!r:.60}")
    return table


def _without_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    table = dict(pairs)
    if len(table) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise BadOption(f"layer config: {twice!r} is given twice: merge the two entries")
    return table


def _parse_rule(text: object, values: object, dialect: Dialect) -> LayerRule:
    if not isinstance(text, str):
        raise BadOption(f"layer config: a pattern is a string, found {text!r}")
    pattern = parse_pattern(text, dialect)
    table = {"scheme": values} if isinstance(values, str) else values
    if not isinstance(table, Mapping) or not table:
        raise BadOption(
            f"layer config, {text!r}: expected a scheme name or a table with some of "
            f"{', '.join(_RULE_TYPES)}, found {values!r:.60}"
        )
    for key, value in table.items():
        _check_value(text, key, value)
    return LayerRule(pattern, table.get("bits"), table.get("group_size"), table.get("sym"), table.get("scheme"))


def _check_value(text: str, key: object, value: object) -> None:
    if not isinstance(key, str) or key not in _RULE_TYPES:
        raise BadOption(f"layer config, {text!r}: unknown key {key!r}; allowed are {', '.join(_RULE_TYPES)}")
    expected = _RULE_TYPES[key]
    if type(value) is not expected:  # an isinstance test would take True for an int
        raise BadOption(f"layer config, {text!r}: {key} must be {expected.__name__}, found {value!r:.60}")
    if key == "bits" and value not in (*range(2, 9), KEEP_BITS):
        raise BadOption(f"layer config, {text!r}: bits must be 2 to 8, or 16 to keep, found {value}")
    if value == "":
        raise BadOption(f"layer config, {text!r}: the scheme's name is empty")
