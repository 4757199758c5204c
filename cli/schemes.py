"""`shardq schemes`"""

import click

from shardq.cli._command import ShardqCommand, output_options
from shardq.cli._console import Console, print_json, print_section, print_table
from shardq.cli._exit_codes import epilog

EXAMPLES = ("shardq schemes", "shardq schemes --json | jq -r '.schemes[].name'")


@click.command("schemes", cls=ShardqCommand, epilog=epilog(EXAMPLES))
@output_options
@click.pass_obj
def schemes(console: Console) -> None:
    """List the names that --scheme knows; --bits, --group-size and --asym change them further.

    Integers may also be spelled out: W6A16_G64_ASYM, W4A16CH (whole rows), W5A8. Names of other tools (FP8-Dynamic,
    INT8, 4bit) are accepted too; --json has those. The file types of llama.cpp stand at the end.
    """
    from shardq.gguf.file_types import FILE_TYPES
    from shardq.schemes import ALIASES, PRESETS

    if console.as_json:
        rows = [
            {
                "name": p.name,
                "bits": p.scheme.bits,
                "group_size": p.scheme.group_size,
                "symmetric": p.scheme.symmetric,
                "scale": p.scheme.scale,
                "activation": p.scheme.activation,
                "calibrated": p.scheme.calibrated,
                "aliases": [a for a, name in ALIASES.items() if name == p.name],
                "bits_of": dict(p.bits_of),
                "summary": p.summary,
            }
            for p in PRESETS.values()
        ]
        types = [{"name": t.name, "number": t.number, "base": t.base, "summary": t.summary} for t in FILE_TYPES]
        print_json({"schemes": rows, "gguf": types})
        return
    print_table(
        ("scheme", "bits", "group", "summary"),
        ((p.name, p.scheme.bits, p.scheme.group_size, p.summary) for p in PRESETS.values()),
    )
    print_section(("file type", "summary"), ((f"gguf:{t.name}", t.summary) for t in FILE_TYPES))
