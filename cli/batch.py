"""`shardq batch`"""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from shardq.cli._batch_text import ShownBatch, describe_rows, print_rows
from shardq.cli._command import ShardqCommand, output_options
from shardq.cli._console import Console, describe_error, print_json
from shardq.cli._exit_codes import RECIPE, epilog
from shardq.errors import BatchLocked, BatchOverBudget, BatchPartlyFailed, BatchUnfinished, DiskFull, HubAccess

if TYPE_CHECKING:
    from collections.abc import Sequence

    from shardq.batch.driver import Row

EXAMPLES = (
    "shardq batch nightly.toml --dry-run",
    "shardq batch nightly.toml",
    "shardq batch nightly.toml --once --quiet --log-file /var/log/shardq.log",
)
ERRORS = (*RECIPE, HubAccess, BatchPartlyFailed, BatchLocked, BatchOverBudget, BatchUnfinished, DiskFull)


@click.command("batch", cls=ShardqCommand, epilog=epilog(EXAMPLES, ERRORS))
@click.argument("manifest", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--once", is_flag=True, help="One attempt for each source, without waiting: the next run goes on.")
@click.option("--dry-run", is_flag=True, help="Say what would be made and why, and make nothing.")
@output_options
@click.pass_obj
def batch(console: Console, manifest: Path, once: bool, dry_run: bool) -> None:
    """Make everything that MANIFEST, a TOML file, asks for and that is not up to date.

    An output is up to date if its destination records the source's newest commit and the recipe. What fails in passing
    is tried again later, other failures do not keep the rest from being made. The same command goes on with a run that
    was stopped; a second one beside it ends at once. 0: all is up to date now, or was before.
    """
    from shardq.batch.driver import judge_rows, plan_batch, run_batch
    from shardq.batch.manifest import read_manifest

    read = read_manifest(manifest)
    wanted = dataclasses.replace(read, limits=dataclasses.replace(read.limits, log=console.log))
    if dry_run:
        _show(console, plan_batch(wanted), None)
        return
    with ShownBatch(console) as shown:
        rows = run_batch(wanted, once, shown)
    _show(console, rows, judge_rows(rows))


def _show(console: Console, rows: "Sequence[Row]", error: Any) -> None:
    """The table of all entries, or the document; then the error that the batch ends with."""
    if console.as_json:
        document: dict[str, Any] = {"entries": describe_rows(rows)}
        if error:
            document["error"] = describe_error(type(error).__name__, str(error), error.exit_code)
        print_json(document)
        click.get_current_context().exit(error.exit_code if error else 0)
    if not console.quiet:
        print_rows(rows)
    if error:
        raise error
