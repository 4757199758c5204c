"""Sizes as users write them."""

import re
from typing import Final

from shardq.errors import BadOption

_POWERS: Final = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}
_SIZE: Final = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(I?)B?", re.IGNORECASE)


def parse_size(text: str | None, option: str) -> int | None:
    """Bytes of `500M`, `6G`, `1.5GB` (powers of 1000), `6GiB` (powers of 1024) or `6000000000`; None for None.

    Rounded down to a whole byte. Raises BadOption, also for less than one byte.
    """
    if text is None:
        return None
    found = _SIZE.fullmatch(text.strip())
    if found and (found[2] or not found[3]):
        base = 1024 if found[3] else 1000
        size_bytes = int(float(found[1]) * base ** _POWERS[found[2].upper()])
        if size_bytes > 0:
            return size_bytes
    raise BadOption(f"{option} {text!r} is not a size: expected a positive number, as 500M, 6G, 6GiB or 6000000000")
