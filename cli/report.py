"""`shardq report`"""

import json
from pathlib import Path

import click

from shardq.cli._command import ShardqCommand, output_options
from shardq.cli._console import Console, print_json, show_bytes
from shardq.cli._exit_codes import SOURCE, epilog
from shardq.errors import BadOption, VerifyFailed

EXAMPLES = (
    "shardq report name-W4A16",
    "shardq report org/name-W4A16 -o name.html",
    "shardq report --compare name-W4A16 name-NVFP4 -o both.html",
)
TWO = 2


@click.command("report", cls=ShardqCommand, epilog=epilog(EXAMPLES, (*SOURCE, VerifyFailed)))
@click.argument("results", metavar="OUT_OR_REPO...", nargs=-1, required=True)
@click.option("--compare", is_flag=True, help="Put two results side by side.")
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="The page. Default: the result's name with .html behind it, in the current folder.",
)
@click.option(
    "--run",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="What `quantize --json` printed, for the time that it took.",
)
@output_options
@click.pass_obj
def report(console: Console, results: tuple[str, ...], compare: bool, output: Path | None, run: Path | None) -> None:
    """Write a page of HTML about a finished output: sizes, bits per weight, errors, schemes, what is kept, engines.

    OUT_OR_REPO is a folder or org/name[@revision]; records and headers are read, no weights. The page holds all that it
    needs, and may be sent or published as it is.
    """
    from shardq.files.atomic import write_atomic
    from shardq.html_report.facts import read_facts
    from shardq.html_report.page import describe_facts, draw_comparison, draw_report

    if len(results) != (TWO if compare else 1):
        raise BadOption(f"{len(results)} results: expected one, or two with --compare")
    if compare and run:
        raise BadOption("--run tells of one result: leave it out beside --compare")
    found = [read_facts(r) for r in results]
    page = draw_comparison(*found) if compare else draw_report(found[0], _seconds(run))
    path = output or Path("-".join(f.label.partition("@")[0] for f in found) + ".html")
    write_atomic(path, page.encode())
    if console.as_json:
        print_json({"page": str(path), "bytes": len(page.encode()), "results": [describe_facts(f) for f in found]})
    elif not console.quiet:
        click.echo(f"{path}: {show_bytes(len(page.encode()))}")


def _seconds(run: Path | None) -> float | None:
    """Raises BadOption."""
    if run is None:
        return None
    try:
        return float(json.loads(run.read_text(encoding="utf-8"))["seconds"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise BadOption(f"{run.name} is not what `quantize --json` prints for one output: {error}") from error
