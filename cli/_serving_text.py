"""Verdicts of engines as people read them."""

from collections.abc import Sequence
from typing import Any, Final

from shardq.cli._console import print_section

_ANSWERS: Final = {"loads": "loads", "limits": "loads with limits", "no": "will not load"}


def print_serving(engines: Sequence[dict[str, Any]]) -> None:
    """One line for each engine and for each reason."""
    print_section(("engine", "one device", "2, 4, 8 devices", "why"), [row for e in engines for row in _rows(e)])


def _rows(engine: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    parallel = {tp: v for tp, v in engine["tensor_parallel"].items() if tp != "1"}
    many = ", ".join(v["answer"] for v in parallel.values())
    reasons = [_told(r) for r in engine["reasons"]]
    seen: set[str] = set()
    for tp, verdict in parallel.items():
        for r in verdict["reasons"]:
            if r["fact"] not in seen:
                seen.add(r["fact"])
                reasons.append(f"{tp} devices: {_told(r)}")
    first, *more = reasons or [""]
    name = f"{engine['engine']} ({engine['version']})"
    return [(name, _ANSWERS[engine["answer"]], many, first), *(("", "", "", r) for r in more)]


def _told(reason: dict[str, Any]) -> str:
    if not reason["places"]:
        return str(reason["text"])
    more = f" and {reason['count'] - 1} more" if reason["count"] > 1 else ""
    return f"{reason['text']}: {reason['places'][0]}{more}"
