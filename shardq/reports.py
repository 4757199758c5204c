"""Plain values of a plan for --json and for scripts."""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from shardq.companions import find_companions
from shardq.gguf.planned import PlannedGguf
from shardq.limits import Limits
from shardq.needs import disk_bytes
from shardq.onepass import OnePass
from shardq.plans import Plan
from shardq.scale_choice import choose_scales
from shardq.serving.report import describe_serving
from shardq.serving.served import served_of_plan
from shardq.spans import largest_span_bytes
from shardq.speed import cpu_name, estimate, read_speed
from shardq.traffic import REQUEST_LIMITS, WINDOW_S, ahead_bytes, count_requests, lent_bytes, requests_s


def describe_plan(plan: Plan, tensors: bool = True) -> dict[str, Any]:
    """Counts, bytes and, unless `tensors` is false, every weight with its role, deciding rule, action and scheme, and
    what became of the source's tensors that are no weights of their own.

    Byte counts are None when only an index is known.
    """
    c = plan.checkpoint
    work = OnePass((plan,)) if plan.files else None
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
            "tensors": len(c.tensors),
            "weights": len(plan.decisions),
            "quantized_modules": actions["quantize"],
            "kept_modules": sum(d.action == "copy" for d in matrices),
            "shards": len(c.shards),
            "tasks": len(plan.tasks),
            "roles": dict(sorted(roles.items())),
        },
        "bytes": {
            "source": plan.source_bytes if work else None,
            "output": plan.output_bytes if work else None,
            "largest_task": work.largest_task_bytes if work else None,
            "quantized_source": sum(d.tensor.size_bytes for d in plan.decisions if d.scheme) if work else None,
        },
        "needs": describe_needs(work) if work else None,
        "serving": describe_serving(served_of_plan(plan)) if work else None,
        "absorbed": _count_absorbed(plan),
        "scales": choose_scales(plan).describe(),
        "warnings": list(plan.warnings),
    }
    if plan.gguf:
        described["gguf"] = describe_gguf(plan, plan.gguf)
    if tensors:
        described["tensors"] = list(describe_tensors(plan))
        described["source_tensors"] = dict(describe_sources(plan))
    return described


def describe_gguf(plan: Plan, gguf: PlannedGguf) -> dict[str, Any]:
    """Files with their sizes, and every tensor of them."""
    return {
        "files": [{"name": f.name, "size": f.size_bytes} for f in plan.files],
        "tensors": [
            {"name": t.name, "type": t.type, "shape": list(t.shape), "size": t.size_bytes, "file": t.file}
            for t in gguf.tensors
        ],
    }


def describe_tensors(plan: Plan) -> Iterator[dict[str, Any]]:
    """Every weight."""
    names = {d.scheme: d.scheme.name for d in plan.decisions if d.scheme}
    for d in plan.decisions:
        yield {
            "name": d.tensor.name,
            "role": d.role.value,
            "rule": d.rule,
            "action": d.action,
            "scheme": names[d.scheme] if d.scheme else None,
            "carried": d.carried,
            "shard": d.tensor.shard,
            "dtype": d.tensor.dtype,
            "shape": list(d.tensor.shape) if d.tensor.shape is not None else None,
        }


def describe_sources(plan: Plan) -> Iterator[tuple[str, dict[str, Any]]]:
    """What became of each of the source's tensors that are no weights of their own."""
    for name, a in plan.weights.absorbed.items():
        yield name, {"outcome": a.fate, "into": a.into, "reason": a.reason}


def _count_absorbed(plan: Plan) -> dict[str, Any]:
    """What the source has as codes, as stacks that are split, and what stays behind: weights by their kind, stacks and
    the matrices of all their experts by the row of families.toml, and tensors by the reason."""
    companions = find_companions(plan.checkpoint.tensors.values()) if plan.weights.absorbed else ()
    split: dict[str, Counter[str]] = {}
    for stack in plan.weights.stacks:
        parts = 1 if stack.emit == "stacked" else len(stack.parts)
        split.setdefault(stack.row, Counter()).update(stacks=1, matrices=parts * (stack.experts or 0))
    dropped = Counter(a.reason for a in plan.weights.absorbed.values() if a.fate == "dropped")
    dropped.update(d.rule for d in plan.decisions if d.action == "drop")
    return {
        "decoded": dict(sorted(Counter(c.kind for c in companions if c.part == "codes" and c.paired).items())),
        "split": {row: dict(counts) for row, counts in split.items()},
        "dropped": dict(dropped),
    }


def describe_needs(work: OnePass) -> dict[str, Any]:
    """The least disk of each way to run it, and for a source on the Hub the requests and what the Hub allows."""
    remote = work.checkpoint.commit is not None
    needs: dict[str, Any] = {
        "disk": {
            "default": disk_bytes(work, staged=remote, uploads=False),
            "stream": disk_bytes(work, staged=False, uploads=False, streamed=remote),
            "push": disk_bytes(work, staged=remote, uploads=True),
            "push_stream": disk_bytes(work, staged=False, uploads=True, streamed=remote),
        },
        "span": largest_span_bytes(work),
    }
    if remote:
        for name, stream in (("default", False), ("stream", True)):
            found = count_requests(work, stream)
            needs.setdefault("requests", {})[name] = {"hub": found.hub, "storage": found.storage}
        needs["read_twice"] = ahead_bytes(work) + lent_bytes(work)  # by --stream
        needs["request_limit"] = {"window_s": WINDOW_S, **REQUEST_LIMITS}
        hub = needs["requests"]["default"]["hub"]
        needs["request_s"] = {who: requests_s(hub, n) for who, n in REQUEST_LIMITS.items()}
    return needs


def describe_cost(plans: Sequence[Plan], rate_bytes_s: int | None) -> dict[str, Any]:
    """Memory that a run with a worker for each core needs at least, how long moving bytes takes at a rate, None without
    one, and CPU time by what was measured on this machine, None where nothing was. One read serves all plans.

    Raises SourceUnreadable for a damaged record of speeds.
    """
    limits, remote, speed = Limits(), plans[0].checkpoint.commit is not None, read_speed()
    costs = [estimate(p, speed) for p in plans] if speed else []
    source, output = plans[0].source_bytes, sum(p.output_bytes for p in plans)
    return {
        "workers": limits.parallel,
        "ram": limits.least_ram_bytes(OnePass(tuple(plans)), remote, remote),
        "link": None if rate_bytes_s is None else {
            "bytes_s": rate_bytes_s, "download_s": source / rate_bytes_s, "upload_s": output / rate_bytes_s,
        },
        "cpu": None if speed is None else {
            "seconds": sum(c.cpu_s for c in costs),
            "unmeasured_weights": sum(c.unknown_weights for c in costs),
            "measured": speed.measured,
            "same_machine": speed.cpu == cpu_name(),
            "version": speed.version,
        },
    }  # fmt: skip
