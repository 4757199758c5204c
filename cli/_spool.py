"""Options that say where hidden states lie, of commands that run tokens through a model."""

from collections.abc import Callable
from typing import Any, Final, TypeVar, get_args

import click

from shardq.limits import SpoolAs

F = TypeVar("F", bound=Callable[..., Any])
SPOOL: Final = click.Choice(get_args(SpoolAs))
SPOOL_HELP: Final = (
    "How hidden states that --max-ram does not let stay in memory lie in files; auto: compressed where the disk, or "
    "--max-disk, has no room for them else. Default: auto."
)


def spool_options(place: str) -> Callable[[F], F]:
    """Limits of hidden states, which lie in files at a `place` beyond them."""

    def add(function: F) -> F:
        for option in (
            click.option("--spool", type=SPOOL, default="auto", help=SPOOL_HELP),
            click.option("--max-disk", metavar="SIZE", help=f"Of that file, which lies {place} and goes at the end."),
            click.option(
                "--max-ram", metavar="SIZE", help="Of hidden states in memory, as 6G; beyond it they lie in a file."
            ),
        ):
            function = option(function)
        return function

    return add
