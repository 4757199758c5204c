"""Types that users choose themselves: for tensors whose names a regular expression hits, or for a model's two ends.

Patterns mean what they mean to llama-quantize (llama.cpp as in llama-cpp-python 0.3.36, tools/quantize): it lowers them
and gives them to `std::regex_search`, in the ECMAScript grammar. Where Python's `re` reads the same text otherwise, or
lowering turns it into something else, it is refused.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from shardq.errors import BadOption
from shardq.kernels.contract_blocks import BLOCK_FORMATS

OPTION: Final = "--tensor-type"
PLAIN_TYPES: Final = ("F16", "BF16", "F32")
WRITABLE_TYPES: Final = (*BLOCK_FORMATS, *PLAIN_TYPES)

# Of patterns without their escapes -> what they have that the grammars do not share.
FOREIGN: Final = (
    (r"\(\?(?![:=!])", "a group of Python's"),
    (r"[*+?}]\+", "a possessive repetition"),
    (r"\{(?!\d+(,\d*)?\})", "a brace that repeats nothing"),
    (r"\[\^?\]|\[\^?[^\]]*\[[:.=]", "a class that Python reads otherwise"),
)
FOREIGN_ESCAPE: Final = re.compile(r"\\([A-Z]|[a-z](?<![bdswtnrfvcux]))")


@dataclass(frozen=True, slots=True)
class Override:
    """Tensors whose name has a match of `pattern` get `type`."""

    text: str  # of the pattern, for messages
    pattern: re.Pattern[str]
    type: str


def read_type(option: str, text: str) -> str:
    """The element type that a user names for `option`, whatever its case. Raises BadOption."""
    name = text.upper()
    if name not in WRITABLE_TYPES:
        raise BadOption(f"{option} {text!a}: expected one of {', '.join(WRITABLE_TYPES)}")
    return name


def compile_overrides(overrides: Sequence[tuple[str, str]]) -> tuple[Override, ...]:
    """Pairs of a pattern and a type, in order. Raises BadOption for an empty or impossible pattern, one that
    llama-quantize would read otherwise, and a type that shardq does not write."""
    return tuple(Override(text, _compile(text), read_type(f"{OPTION} {text}=", kind)) for text, kind in overrides)


def find_override(overrides: Sequence[Override], name: str) -> str | None:
    """The type of the first that hits a tensor of this name."""
    return next((override.type for override in overrides if override.pattern.search(name)), None)


def _compile(text: str) -> re.Pattern[str]:
    if not text:
        raise BadOption(f"{OPTION}: the pattern is empty; `.*` hits every tensor")
    if escape := FOREIGN_ESCAPE.search(text):
        raise BadOption(
            f"{OPTION} {text!a}: {escape[0]} is not the same to llama-quantize, which lowers patterns first"
        )
    bare = re.sub(r"\\.", "x", text)
    for pattern, what in FOREIGN:
        if re.search(pattern, bare):
            raise BadOption(f"{OPTION} {text!a} has {what}, which llama-quantize does not know: write it plainly")
    try:
        return re.compile(text.lower(), re.ASCII)
    except re.error as error:
        raise BadOption(f"{OPTION} {text!a} is no valid regular expression ({error}): correct it") from error
