"""Names of a model's tensors, with those that differ in their numbers only put together."""

import re
from collections.abc import Iterable
from typing import Final

_NUMBER: Final = re.compile(r"(?<![^.])\d+(?![^.])")  # a whole segment
_PLACE: Final = "\0"  # of a number, in no name


def collapse(names: Iterable[str]) -> dict[str, int]:
    """`model.layers.[0-31].mlp.up_proj` -> how many names it stands for, in the order of the first of each.

    With several ranges the count may be below their product: not every layer has every expert.
    """
    numbers: dict[str, list[set[int]]] = {}
    counts: dict[str, int] = {}
    for name in names:
        shape = _NUMBER.sub(_PLACE, name)
        found = [int(n) for n in _NUMBER.findall(name)]
        seen = numbers.setdefault(shape, [set() for _ in found])
        for numbers_here, number in zip(seen, found, strict=True):
            numbers_here.add(number)
        counts[shape] = counts.get(shape, 0) + 1
    return {_fill(shape, numbers[shape]): count for shape, count in counts.items()}


def _fill(shape: str, numbers: list[set[int]]) -> str:
    ranges = iter(_ranges(sorted(ns)) for ns in numbers)
    return ".".join(next(ranges) if segment == _PLACE else segment for segment in shape.split("."))


def _ranges(numbers: list[int]) -> str:
    """`7` for [7], `[0-2,5]` for [0, 1, 2, 5]."""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and runs[-1][-1] == n - 1:
            runs[-1] = [runs[-1][0], n]
        else:
            runs.append([n])
    text = ",".join("-".join(map(str, run)) for run in runs)
    return text if text.isdigit() else f"[{text}]"
