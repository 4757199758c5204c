"""Types of many tensors as a short text: block after block of each stem, how often a type follows itself."""

import re
from collections.abc import Iterable, Mapping
from itertools import groupby

BLOCK = re.compile(r"blk\.(\d+)\.")


def _key(name: str) -> tuple[str, int, str]:
    block = BLOCK.match(name)
    return BLOCK.sub("", name), int(block[1]) if block else -1, name


def pack(types: Mapping[str, str]) -> str:
    runs = [(kind, len(list(same))) for kind, same in groupby(types[name] for name in sorted(types, key=_key))]
    return " ".join(kind if count == 1 else f"{kind}*{count}" for kind, count in runs)


def unpack(names: Iterable[str], text: str) -> dict[str, str]:
    words = [word.partition("*") for word in text.split()]
    types = [kind for kind, _, count in words for _ in range(int(count or 1))]
    return dict(zip(sorted(names, key=_key), types, strict=True))
