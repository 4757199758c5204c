"""A plan as people read it."""

from collections import Counter
from typing import TYPE_CHECKING, Any, Final

from shardq.cli._console import Console, print_json, print_json_rows, print_pairs, print_section, show_bytes
from shardq.cli._progress import duration
from shardq.cli._serving_text import print_serving
from shardq.collapse import collapse

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from shardq.plans import Plan

_OBVIOUS: Final = ("norm", "vector")  # roles that nobody expects to be quantized


def print_plans(console: Console, plans: "Sequence[Plan]", tensors: bool, rate_bytes_s: int | None = None) -> None:
    """One plan, or all outputs of a run with what they need together; `tensors`: each of them in --json. With a rate
    also how long bytes take."""
    from shardq.onepass import OnePass
    from shardq.reports import describe_cost, describe_needs, describe_plan, describe_sources, describe_tensors

    cost = describe_cost(plans, rate_bytes_s) if plans[0].files else None
    if console.as_json:
        if tensors and len(plans) == 1:
            (plan,) = plans
            rows, tables = {"tensors": describe_tensors(plan)}, {"source_tensors": describe_sources(plan)}
            print_json_rows({**describe_plan(plan, tensors=False), "cost": cost}, rows, tables)
            return
        described = [describe_plan(p, tensors) for p in plans]
        needs = describe_needs(OnePass(tuple(plans))) if plans[0].files else None
        document = described[0] if len(plans) == 1 else {"outputs": described, "needs": needs}
        print_json({**document, "cost": cost})
        return
    for plan in plans:
        print_plan(console, plan, cost if len(plans) == 1 else None)
    if len(plans) > 1 and plans[0].files:
        largest = show_bytes(OnePass(tuple(plans)).largest_task_bytes)
        print_pairs(
            [
                ("together", f"{len(plans)} outputs"),
                ("largest task", largest),
                *_needs(describe_needs(OnePass(tuple(plans)))),
                *_cost(cost),
            ]
        )


def print_plan(console: Console, plan: "Plan", cost: dict[str, Any] | None) -> None:
    """Counts, bytes, schemes, roles, what is kept and why, and what it costs."""
    from shardq.reports import describe_plan, describe_tensors

    d = describe_plan(plan, tensors=False)
    print_pairs(_summary(d, cost))
    schemes = Counter(x.scheme.name + (", carried" if x.carried else "") for x in plan.decisions if x.scheme)
    print_section(("scheme", "modules"), schemes.items())
    print_section(("role", "weights"), d["counts"]["roles"].items())
    print_section(("of the source", "number", "as"), _absorbed(d["absorbed"]))
    print_section(("kept in source precision", "tensors", "role", "rule"), _kept(describe_tensors(plan)))
    if plan.gguf:
        print_section(("file", "bytes"), [(f.name, f.size_bytes) for f in plan.files])
        rows = [(t.name, t.type, " x ".join(map(str, t.shape)), t.size_bytes) for t in plan.gguf.tensors]
        print_section(("tensor", "type", "shape", "bytes"), rows)
    if d["serving"]:
        print_serving(d["serving"])
    console.warn(d["warnings"])


def _summary(d: dict[str, Any], cost: dict[str, Any] | None) -> list[tuple[str, str]]:
    counts, size = d["counts"], d["bytes"]
    change = "unknown: not all shapes are known"
    memory = ""
    stand = f", which stand for {counts['weights']} weights" if counts["weights"] != counts["tensors"] else ""
    if size["output"] is not None:
        change = f"{show_bytes(size['source'])} -> {show_bytes(size['output'])}"
        memory = show_bytes(size["largest_task"])
    return [
        ("source", d["source"]),
        ("commit", d["commit"] or ""),
        ("layout", d["layout"]),
        ("loaders", d["loaders"]),
        (
            "tensors",
            f"{counts['tensors']} in {counts['shards']} shards{stand}: {counts['quantized_modules']} quantized",
        ),
        ("scales", d["scales"]["text"]),
        ("bytes", change),
        ("largest task", memory),
        *(_needs(d["needs"]) if d["needs"] else ()),
        *_cost(cost),
        ("fingerprint", d["fingerprint"]),
    ]


def _needs(needs: dict[str, Any]) -> list[tuple[str, str]]:
    """The least disk, and requests beside the Hub's limit."""
    disk = {k: show_bytes(v) for k, v in needs["disk"].items()}
    ways = f"with --stream {disk['stream']}; with --push-to {disk['push']}; with both {disk['push_stream']}"
    rows = [("disk", f"at least {disk['default']}; {ways}")]
    if "requests" in needs:
        r, limit = needs["requests"], needs["request_limit"]
        minutes = limit["window_s"] // 60
        allowed = f"{limit['anonymous']} in {minutes} minutes, {limit['token']} with a token, {limit['pro']} with PRO"
        storage = f"{r['default']['storage']} to its storage, {r['stream']['storage']} with --stream"
        waits = needs["request_s"]["anonymous"]
        wait = f" (at least {duration(waits)} without a token)" if waits else ""
        rows.append(("requests", f"{r['default']['hub']} to the Hub, which allows {allowed}{wait}; {storage}"))
    return rows


def _cost(cost: dict[str, Any] | None) -> list[tuple[str, str]]:
    """Memory, and time: of a link, and of this machine's cores if they were measured."""
    if cost is None:
        return []
    workers = cost["workers"]
    rows = [("memory", f"at least {show_bytes(cost['ram'])} with {workers} workers")]
    if link := cost["link"]:
        rate, down, up = show_bytes(link["bytes_s"]), duration(link["download_s"]), duration(link["upload_s"])
        rows.append(("link", f"{down} to download at {rate}/s, {up} to upload the output"))
    cpu = cost["cpu"]
    if cpu is None:
        return [*rows, ("CPU", "not known: `shardq kernels --bench` measures this machine")]
    left = f", without {cpu['unmeasured_weights']} weights of kinds not measured" if cpu["unmeasured_weights"] else ""
    there = "" if cpu["same_machine"] else ", on another CPU: measure again"
    each = f", {duration(cpu['seconds'] / workers)} on {workers}" if workers > 1 else ""
    measured = f"measured {cpu['measured'][:10]}{there}"
    return [*rows, ("CPU", f"{duration(cpu['seconds'])} of one core{each}{left} ({measured})")]


def _absorbed(absorbed: dict[str, Any]) -> list[tuple[str, int, str]]:
    """What is decoded, split, and left behind."""
    decoded = [("weights in codes, decoded", n, kind) for kind, n in absorbed["decoded"].items()]
    split = [
        ("expert stacks, split", n["stacks"], f"{row}: {n['matrices']} matrices")
        for row, n in absorbed["split"].items()
    ]
    return [*decoded, *split, *(("tensors left out", n, reason) for reason, n in absorbed["dropped"].items())]


def _kept(tensors: "Iterable[dict[str, Any]]") -> list[tuple[str, int, str, str]]:
    """Names without their numbers, by role and deciding rule."""
    by_reason: dict[tuple[str, str], list[str]] = {}
    for t in tensors:
        if t["action"] == "copy" and t["role"] not in _OBVIOUS:
            by_reason.setdefault((t["role"], t["rule"]), []).append(t["name"])
    return [(name, count, *reason) for reason, names in by_reason.items() for name, count in collapse(names).items()]
