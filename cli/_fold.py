"""The fold of a command: one that is there, or found now and written beside the output."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from shardq.cli._console import Console, show_share

if TYPE_CHECKING:
    from shardq.recipe import Recipe

AUTO: Final = "auto"
SUFFIX: Final = ".fold.zst"  # of the file beside an output folder
SHOWN: Final = 3  # reasons told before "and N more"


def write_fold(console: Console, source: str, subfolder: str | None, recipe: "Recipe", path: Path) -> None:
    """Find the fold, and write it; a file that is there already is used as it is."""
    from shardq import api
    from shardq.fold import write_fold as write

    if path.exists():
        if not console.quiet:
            click.echo(f"using the fold in {path}; delete it to find it again", err=True)
        return
    with _progress(console) as report:
        found = api.find_fold(source, recipe, subfolder=subfolder, report=report)
    write(path, found.fold)
    if console.quiet:
        return
    click.echo(f"fold of {found.norms} norms and {found.pairs} pairs written to {path}", err=True)
    for reason in found.left[:SHOWN]:
        click.echo(f"not folded: {reason}", err=True)
    if len(found.left) > SHOWN:
        click.echo(f"not folded: {len(found.left) - SHOWN} more", err=True)


@contextlib.contextmanager
def _progress(console: Console) -> Iterator[Callable[[int, int], None]]:
    """A line for each tenth, or on a terminal one that changes."""
    tenths = {0} if not console.quiet else set(range(11))
    on_terminal = sys.stderr.isatty() and not console.quiet and not console.verbose

    def report(done_bytes: int, all_bytes: int) -> None:
        tenth = 10 * done_bytes // max(1, all_bytes)
        text = f"looking for a fold: {show_share(done_bytes, all_bytes)}"
        if on_terminal:
            click.echo(f"\r{text}\x1b[K", err=True, nl=done_bytes == all_bytes)
        elif tenth not in tenths:
            tenths.add(tenth)
            click.echo(text, err=True)

    yield report
