"""Names of tensors as patterns and numbers: `model.layers.3.mlp.experts.7.up_proj` is layer 3 of one, expert 7."""

import re
from dataclasses import dataclass
from typing import Final

NUMBER: Final = re.compile(r"(?<![^.])\d+(?![^.])")  # a whole segment
GAP: Final = "\0"  # of a number, in no name
ANY: Final = "*"  # of all experts


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor lies in a model."""

    stack: str  # what numbered layers belong to, as `model.layers`; empty outside
    layer: int | None
    module: str  # below the layer, all experts together; outside of layers the whole name


def split_name(name: str) -> tuple[str, tuple[int, ...]]:
    """The pattern, with a gap for each number, and the numbers."""
    return NUMBER.sub(GAP, name), tuple(int(n) for n in NUMBER.findall(name))


def place_of(name: str) -> Place:
    """The first number of a name is its layer, further ones are of experts."""
    first = NUMBER.search(name)
    whole = name.removesuffix(".weight")
    if first is None:
        return Place("", None, whole)
    stack, rest = name[: first.start()].rstrip("."), whole[first.end() :].lstrip(".")
    return Place(stack, int(first.group()), NUMBER.sub(ANY, rest))
