"""The fold of a command: one that is there, or found now and written beside the output."""

from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from shardq.cli._console import Console

if TYPE_CHECKING:
    from shardq.recipe import Recipe

AUTO: Final = "auto"
SUFFIX: Final = ".fold.zst"  # of the file beside an output folder


def write_fold(console: Console, source: str, subfolder: str | None, recipe: "Recipe", path: Path) -> None:
    """Find the fold, and write it; a file that is there already is used as it is."""
    from shardq import api
    from shardq.fold import write_fold as write

    if path.exists():
        if not console.quiet:
            click.echo(f"using the fold in {path}; delete it to find it again", err=True)
        return
    found = api.find_fold(source, recipe, subfolder=subfolder)
    write(path, found.fold)
    if not console.quiet:
        read = f"{found.read_bytes / 1e9:.2f} GB read"
        click.echo(f"fold of {found.norms} norms and {found.pairs} pairs written to {path}, {read}", err=True)
        for reason in found.left:
            click.echo(f"not folded: {reason}", err=True)
