"""`shardq schemes`"""

import click

from shardq.cli._command import ShardqCommand, output_options
from shardq.cli._console import Console, print_json, print_table
from shardq.cli._exit_codes import epilog

EXAMPLES = ("shardq schemes", "shardq schemes --json | jq -r '.schemes[].name'")


@click.command("schemes", cls=ShardqCommand, epilog=epilog(EXAMPLES))
@output_options
@click.pass_obj
def schemes(console: Console) -> None:
    """List the names that --scheme knows; --bits, --group-size and --asym change them further."""
    from shardq.schemes import PRESETS

    if console.as_json:
        rows = [
            {
                "name": p.name,
                "bits": p.scheme.bits,
                "group_size": p.scheme.group_size,
                "symmetric": p.scheme.symmetric,
                "scale": p.scheme.scale,
                "bits_of": dict(p.bits_of),
                "summary": p.summary,
            }
            for p in PRESETS.values()
        ]
        print_json({"schemes": rows})
        return
    print_table(
        ("scheme", "bits", "group", "summary"),
        ((p.name, p.scheme.bits, p.scheme.group_size, p.summary) for p in PRESETS.values()),
    )
