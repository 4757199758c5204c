"""Verdicts as plain values, for --json and for people."""

from typing import Any

from shardq.serving.judge import Verdict, judge, parallel_verdicts
from shardq.serving.served import Served


def describe_serving(served: Served) -> list[dict[str, Any]]:
    """One entry for each engine: answer, reasons, and for engines that cut matrices the answers by number of devices,
    with the reasons that one device does not have."""
    parallel = parallel_verdicts(served)
    return [_described(v, parallel.get(v.engine, {})) for v in judge(served)]


def _described(verdict: Verdict, parallel: dict[int, Verdict]) -> dict[str, Any]:
    alone = {r.fact for r in verdict.reasons}
    return {
        "engine": verdict.engine,
        "version": verdict.version,
        "answer": verdict.answer,
        "reasons": _reasons(verdict, set()),
        "tensor_parallel": {str(tp): {"answer": v.answer, "reasons": _reasons(v, alone)} for tp, v in parallel.items()},
    }


def _reasons(verdict: Verdict, known: set[str]) -> list[dict[str, Any]]:
    return [
        {
            "fact": r.fact,
            "answer": r.answer,
            "text": r.text,
            "places": list(r.places),
            "count": r.count,
            "source": r.source,
        }
        for r in verdict.reasons
        if r.fact not in known
    ]
