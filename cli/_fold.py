"""The fold of a command: one that is there, or found now and written beside the output."""

from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from shardq.cli._console import Console, show_share
from shardq.cli._progress import tenths_progress

if TYPE_CHECKING:
    from shardq.recipe import Recipe

AUTO: Final = "auto"
SUFFIX: Final = ".fold.zst"  # of the file beside an output folder
SHOWN: Final = 3  # reasons told before "and N more"


def write_fold(console: Console, source: str, subfolder: str | None, recipe: "Recipe", path: Path) -> None:
    """Find the fold, and write it; a file that is there already is used as it is."""
    from shardq import quality
    from shardq.fold import write_fold as write

    if path.exists():
        if not console.quiet:
            click.echo(f"using the fold in {path}; delete it to find it again", err=True)
        return
    with tenths_progress(console, lambda done, of: f"looking for a fold: {show_share(done, of)}") as report:
        found = quality.find_fold(source, recipe, subfolder=subfolder, report=report)
    write(path, found.fold)
    if console.quiet:
        return
    click.echo(f"fold of {found.norms} norms and {found.pairs} pairs written to {path}", err=True)
    for reason in found.left[:SHOWN]:
        click.echo(f"not folded: {reason}", err=True)
    if len(found.left) > SHOWN:
        click.echo(f"not folded: {len(found.left) - SHOWN} more", err=True)
