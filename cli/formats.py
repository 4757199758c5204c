"""`shardq formats`"""

import click

from shardq.cli._command import ShardqCommand, output_options
from shardq.cli._console import Console, print_json, print_table
from shardq.cli._exit_codes import epilog

EXAMPLES = ("shardq formats", "shardq formats --json | jq -r '.formats[].name'")


@click.command("formats", cls=ShardqCommand, epilog=epilog(EXAMPLES))
@output_options
@click.pass_obj
def formats(console: Console) -> None:
    """List the layouts that --format knows, and who loads them."""
    from shardq.layouts import LISTED

    if console.as_json:
        rows = [
            {"name": x.name, "aliases": list(x.aliases), "summary": x.summary, "loaders": x.loaders} for x in LISTED
        ]
        print_json({"formats": rows})
        return
    print_table(
        ("layout", "aliases", "tensors of a module", "loaders"),
        ((x.name, ", ".join(x.aliases), x.summary, x.loaders) for x in LISTED),
    )
