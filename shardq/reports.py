"""Plain values of a plan for --json and for scripts."""

from collections import Counter
from typing import Any

from shardq.needs import ANONYMOUS_REQUESTS, TOKEN_REQUESTS, WINDOW_S, ahead_bytes, count_requests, disk_bytes
from shardq.onepass import OnePass
from shardq.plans import Plan
from shardq.serving.report import describe_serving
from shardq.serving.served import served_of_plan
from shardq.spans import largest_span_bytes


def describe_plan(plan: Plan, tensors: bool = True) -> dict[str, Any]:
    """Counts, bytes and, unless `tensors` is false, every tensor with its role, deciding rule, action and scheme.

    Byte counts are None when only an index is known.
    """
    c = plan.checkpoint
    known = bool(plan.files)
    actions = Counter(d.action for d in plan.decisions)
    roles = Counter(d.role.value for d in plan.decisions)
    matrices = [
        d for d in plan.decisions if d.tensor.name.endswith(".weight") and d.role.value not in ("norm", "vector")
    ]
    described: dict[str, Any] = {
        "source": c.label,
        "commit": c.commit,
        "fingerprint": plan.fingerprint,
        "recipe": plan.recipe.as_dict(),
        "layout": plan.layout.name,
        "loaders": plan.layout.loaders,
        "counts": {
            "tensors": len(plan.decisions),
            "quantized_modules": actions["quantize"],
            "kept_modules": sum(d.action == "copy" for d in matrices),
            "shards": len(c.shards),
            "tasks": len(plan.tasks),
            "roles": dict(sorted(roles.items())),
        },
        "bytes": {
            "source": plan.source_bytes if known else None,
            "output": plan.output_bytes if known else None,
            "largest_task": OnePass((plan,)).largest_task_bytes if known else None,
            "quantized_source": sum(d.tensor.size_bytes for d in plan.decisions if d.scheme) if known else None,
        },
        "needs": describe_needs(OnePass((plan,))) if known else None,
        "serving": describe_serving(served_of_plan(plan)) if known else None,
        "warnings": list(c.warnings),
    }
    if tensors:
        described["tensors"] = [
            {
                "name": d.tensor.name,
                "role": d.role.value,
                "rule": d.rule,
                "action": d.action,
                "scheme": d.scheme.name if d.scheme else None,
                "shard": d.tensor.shard,
                "dtype": d.tensor.dtype,
                "shape": list(d.tensor.shape) if d.tensor.shape is not None else None,
            }
            for d in plan.decisions
        ]
    return described


def describe_needs(work: OnePass) -> dict[str, Any]:
    """The least disk of each way to run it, and for a source on the Hub the requests and what the Hub allows."""
    remote = work.checkpoint.commit is not None
    needs: dict[str, Any] = {
        "disk": {
            "default": disk_bytes(work, staged=remote, uploads=False),
            "stream": disk_bytes(work, staged=False, uploads=False),
            "push": disk_bytes(work, staged=remote, uploads=True),
            "push_stream": disk_bytes(work, staged=False, uploads=True),
        },
        "span": largest_span_bytes(work),
    }
    if remote:
        for name, stream in (("default", False), ("stream", True)):
            found = count_requests(work, stream)
            needs.setdefault("requests", {})[name] = {"hub": found.hub, "storage": found.storage}
        needs["read_twice"] = ahead_bytes(work)  # by --stream
        needs["request_limit"] = {"window_s": WINDOW_S, "anonymous": ANONYMOUS_REQUESTS, "token": TOKEN_REQUESTS}
    return needs
