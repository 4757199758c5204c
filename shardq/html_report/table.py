"""The table of all tensors, column by column in words that a browser turns into rows: 60,000 of them take some 3 MB."""

import json
from collections.abc import Callable, Sequence
from typing import Any, Final

from shardq.html_report.names import GAP, split_name
from shardq.html_report.rows import Row

ERROR_UNIT: Final = 1e-6
SHARE_UNIT: Final = 1e-4


def encode_rows(rows: Sequence[Row], others: Sequence[float | None] | None = None) -> str:
    """JSON for a script element: names as patterns and numbers, words as indices into lists, errors as whole units.
    `others`: relative errors of another result, in the same order."""
    names = [split_name(r.name) for r in rows]
    columns: dict[str, Any] = {
        "name": _listed([pattern.replace(GAP, "{}") for pattern, _ in names]),
        "numbers": [n for _, numbers in names for n in numbers],
        **{key: _listed([take(r) for r in rows]) for key, take in WORDS.items()},
        "error": [_units(r.relative_error, ERROR_UNIT) for r in rows],
        "other": None if others is None else [_units(x, ERROR_UNIT) for x in others],
        "distance": [_units(None if r.cosine is None else 1 - r.cosine, ERROR_UNIT) for r in rows],
        "saturated": [_units(r.saturated_share, SHARE_UNIT) for r in rows],
        "zeroed": {str(i): r.zeroed_groups for i, r in enumerate(rows) if r.zeroed_groups},
    }
    text = json.dumps(columns, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.replace("<", "\\u003c")  # no tensor's name ends the script


WORDS: Final[dict[str, Callable[[Row], str]]] = {
    "role": lambda r: r.role,
    "outcome": lambda r: r.outcome,
    "rule": lambda r: r.rule,
    "scheme": lambda r: r.scheme,
    "dtype": lambda r: r.dtype,
    "shape": lambda r: " x ".join(map(str, r.shape)),
    "bytes": lambda r: f"{r.output_bytes:.0f}",
}


def _listed(words: Sequence[str]) -> dict[str, Any]:
    """Each word once, and for each row which it is."""
    places = {word: i for i, word in enumerate(dict.fromkeys(words))}
    return {"words": list(places), "at": [places[w] for w in words]}


def _units(value: float | None, unit: float) -> int | None:
    return None if value is None else round(value / unit)
