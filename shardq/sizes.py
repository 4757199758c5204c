"""Sizes, rates and times as users write them."""

import re
from typing import Final

from shardq.errors import BadOption

_POWERS: Final = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}
_SIZE: Final = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(I?)B?", re.IGNORECASE)
_TIME: Final = re.compile(r"(\d+(?:\.\d+)?)\s*([smhd])")
_SECONDS: Final = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


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


def parse_rate(text: str | None, option: str) -> int | None:
    """Bytes for each second of `50M` (bytes, as a size), `1Gbit`, `100Mbit` (bits); None for None. Raises BadOption."""
    if text is None:
        return None
    plain = text.strip().lower().removesuffix("/s")
    if plain.endswith("bit"):
        bits = parse_size(plain.removesuffix("bit"), option)
        assert bits is not None
        return max(1, bits // 8)
    return parse_size(plain, option)


def parse_time(text: str | None, option: str) -> float | None:
    """Seconds of `90s`, `15m`, `2h`, `1d`, `0.5s`; None for None. Raises BadOption."""
    if text is None:
        return None
    found = _TIME.fullmatch(text.strip())
    if not found:
        raise BadOption(f"{option} {text!r} is not a time: expected a number and a unit, as 90s, 15m, 2h or 1d")
    return float(found[1]) * _SECONDS[found[2]]
