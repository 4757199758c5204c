"""`shardq finalize`"""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from shardq.cli._command import ShardqCommand, output_options
from shardq.cli._exit_codes import epilog
from shardq.cli._job import need_source, read_words
from shardq.cli.worker import ERRORS, PUBLISHES, worker

if TYPE_CHECKING:
    from shardq.cli._console import Console

EXAMPLES = ("shardq finalize --job /shared/job",)


@click.command("finalize", cls=ShardqCommand, epilog=epilog(EXAMPLES, ERRORS))
@click.option(
    "--job", required=True, metavar="DIR", type=click.Path(file_okay=False, path_type=Path), help="The job folder."
)
@output_options
@click.pass_context
def finalize(ctx: click.Context, job: Path) -> None:
    """Publish a job of `shardq worker` of which all files are made, or say what is missing.

    The last worker does this by itself: the command is for a job whose workers ended with --no-wait, or were stopped
    just then. It may be repeated.
    """
    words = read_words(job)
    if not words:
        need_source(None, job)
    console: Console = ctx.obj
    shown = ["--json"] * console.as_json + ["-q"] * console.quiet + ["-v"] * console.verbose
    inner = worker.make_context("worker", [*words, "--job", str(job), *shown], parent=ctx)
    inner.meta[PUBLISHES] = True
    with inner:
        worker.invoke(inner)
