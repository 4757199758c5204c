"""Everything that commands print: results on stdout, everything else on stderr."""

import itertools
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import click

from shardq.errors import ShardqError
from shardq.logs import LogConfig

_PIPE_COLUMNS: Final = 1000  # a table that no terminal shows is never wrapped
ROWS_AT_ONCE: Final = 1000  # of a document that is printed piece by piece
_UNITS: Final = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "B"))


@dataclass(frozen=True, slots=True)
class Console:
    """What --json, -v, -q and --log-file say."""

    as_json: bool
    verbose: bool
    quiet: bool
    log: LogConfig

    def warn(self, warnings: Iterable[str]) -> None:
        """What is odd about a checkpoint; with --json it is in the document instead."""
        for warning in () if self.as_json or self.quiet else warnings:
            click.echo(f"warning: {warning}", err=True)

    def fail(self, error: ShardqError) -> None:
        """One line about an error, or with --json the document that stands for the result."""
        if self.as_json:
            print_json({"error": describe_error(type(error).__name__, str(error), error.exit_code)})
        else:
            click.echo(f"error: {error}", err=True)


def describe_error(name: str, message: str, exit_code: int) -> dict[str, Any]:
    """An error as --json shows it."""
    return {"type": name, "message": message, "exit_code": exit_code}


def print_json(document: Mapping[str, Any]) -> None:
    """The one JSON document of a command, in one line. Raises ValueError for NaN and infinity: they are no JSON."""
    click.echo(json.dumps(document, ensure_ascii=False, allow_nan=False))


def print_json_rows(
    document: Mapping[str, Any], rows: Mapping[str, Iterable[Any]], tables: Mapping[str, Iterable[tuple[str, Any]]]
) -> None:
    """`print_json` of a document with further lists and tables, which are never there as a whole."""

    def text(value: object) -> str:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)

    click.echo(text(document)[:-1], nl=False)
    for name, items in rows.items():
        _print_items(f", {text(name)}: [", (text(item) for item in items), "]")
    for name, pairs in tables.items():
        _print_items(f", {text(name)}: {{", (f"{text(key)}: {text(value)}" for key, value in pairs), "}")
    click.echo("}")


def _print_items(opening: str, texts: Iterable[str], closing: str) -> None:
    click.echo(opening, nl=False)
    waiting = iter(texts)
    lead = ""
    while batch := list(itertools.islice(waiting, ROWS_AT_ONCE)):
        click.echo(lead + ", ".join(batch), nl=False)
        lead = ", "
    click.echo(closing, nl=False)


def print_pairs(pairs: Iterable[tuple[str, str]]) -> None:
    """Lines of a name and a value; what has no value is left out."""
    shown = [(name, value) for name, value in pairs if value]
    width = max((len(name) for name, _ in shown), default=0)
    for name, value in shown:
        click.echo(f"{name:<{width}}  {value}")


def print_section(columns: Sequence[str], rows: Iterable[Sequence[str | int]]) -> None:
    """A table behind an empty line; nothing at all without rows."""
    cells = tuple(rows)
    if cells:
        click.echo()
        print_table(columns, cells)


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str | int]]) -> None:
    """A table with at least one row; columns of whole numbers are set to the right."""
    cells = tuple(rows)
    from rich.console import Console as RichConsole
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column, first in zip(columns, cells[0], strict=True):
        table.add_column(column, overflow="fold", justify="right" if isinstance(first, int) else "left")
    for row in cells:
        table.add_row(*map(str, row))
    width = None if sys.stdout.isatty() else _PIPE_COLUMNS
    console = RichConsole(markup=False, emoji=False, highlight=False, width=width)
    with console.capture() as captured:
        console.print(table)
    for line in captured.get().splitlines():
        click.echo(line.rstrip())


def show_bytes(size_bytes: float) -> str:
    """In decimal units: 2.7 GB."""
    factor, unit = _unit(size_bytes)
    return f"{size_bytes / factor:.1f} {unit}" if factor > 1 else f"{size_bytes:.0f} B"


def show_share(part_bytes: int, total_bytes: int) -> str:
    """Both in the unit of the whole: 1.2/2.7 GB."""
    factor, unit = _unit(total_bytes)
    return f"{part_bytes / factor:.1f}/{total_bytes / factor:.1f} {unit}"


def _unit(size_bytes: float) -> tuple[float, str]:
    return next(((f, u) for f, u in _UNITS if size_bytes >= f), _UNITS[-1])
