"""`shardq inspect`"""

from typing import TYPE_CHECKING, Any

import click

from shardq.cli._command import ShardqCommand, output_options
from shardq.cli._console import Console, print_json, print_pairs, print_section, show_bytes
from shardq.cli._exit_codes import SOURCE, epilog
from shardq.cli._gguf_text import show_gguf
from shardq.collapse import collapse

if TYPE_CHECKING:
    from shardq.inspection import Inspection

EXAMPLES = (
    "shardq inspect demo",
    "shardq inspect org/name@main --json | jq .roles",
)


@click.command("inspect", cls=ShardqCommand, epilog=epilog(EXAMPLES, SOURCE))
@click.argument("source")
@click.option("--subfolder", metavar="PATH", help="Folder inside the source that holds the checkpoint.")
@output_options
@click.pass_obj
def inspect(console: Console, source: str, subfolder: str | None) -> None:
    """Show what SOURCE holds: roles of its tensors, layout, schemes, bits per weight. Headers only.

    Of GGUF files, one of which may be SOURCE, it shows each model's architecture, file type, types and bits per weight.

    The last table names the role of every tensor and the rule that decided it; tensors that differ in their numbers
    only share a line.
    """
    from shardq import api
    from shardq.gguf_inspection import GgufInspection

    found = api.inspect(source, subfolder=subfolder)
    if isinstance(found, GgufInspection):
        show_gguf(console, found)
        return
    if console.as_json:
        print_json(_describe(found))
        return
    print_pairs(
        [
            ("source", found.label),
            ("commit", found.commit or ""),
            ("tensors", f"{found.tensors} in {found.shards} shards, {show_bytes(found.size_bytes)}"),
            ("parameters", f"{found.parameters:,}"),
            ("bits per weight", f"{found.bits_per_weight:.3f}"),
            ("layout", found.layout or ""),
            ("quantized by", ", ".join(f"{k} ({n} tensors)" for k, n in found.source_kinds.items())),
        ]
    )
    print_section(("scheme", "modules"), found.schemes.items())
    print_section(("it stands for", "weights"), found.weights.items())
    print_section(("role", "tensors", "bytes"), ((r.role, r.tensors, r.size_bytes) for r in found.roles))
    print_section(("tensor", "tensors", "role", "rule"), _by_reason(found))
    console.warn(found.warnings)


def _by_reason(found: "Inspection") -> list[tuple[str, int, str, str]]:
    names: dict[tuple[str, str], list[str]] = {}
    for name, verdict in found.verdicts.items():
        names.setdefault((verdict.role.value, verdict.rule), []).append(name)
    return [(name, count, *reason) for reason, group in names.items() for name, count in collapse(group).items()]


def _describe(found: "Inspection") -> dict[str, Any]:
    return {
        "source": found.label,
        "commit": found.commit,
        "shards": found.shards,
        "bytes": found.size_bytes,
        "parameters": found.parameters,
        "bits_per_weight": found.bits_per_weight,
        "layout": found.layout,
        "schemes": found.schemes,
        "source_kinds": found.source_kinds,
        "weights": found.weights,
        "roles": {r.role: {"tensors": r.tensors, "bytes": r.size_bytes} for r in found.roles},
        "tensors": {name: {"role": v.role.value, "rule": v.rule} for name, v in found.verdicts.items()},
        "warnings": list(found.warnings),
    }
