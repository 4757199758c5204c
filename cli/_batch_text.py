"""A batch as people and scripts see it: what it does, and what became of each output."""

from contextlib import ExitStack
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Self

import click

from shardq.cli._console import Console, print_table
from shardq.cli._progress import duration, show_progress
from shardq.progress import Progress, Report

if TYPE_CHECKING:
    from collections.abc import Sequence

    from shardq.batch.driver import Row
    from shardq.batch.manifest import Entry, Model
    from shardq.batch.state import Standing
    from shardq.batch.up_to_date import Look


class ShownBatch:
    """Tells on stderr how a batch goes on: a line for each model and output, and the progress of its run."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._run = ExitStack()
        self._report: Report = _nothing

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self._run.close()

    def looked(self, looks: "Sequence[Look]") -> None:
        """How much there is to do."""
        done = sum(look.done for look in looks)
        self._say(f"{done} of {len(looks)} outputs are up to date")

    def begins(self, model: "Model", entries: "Sequence[Entry]") -> None:
        """The model's name and outputs."""
        self._say(f"{model.source}: {', '.join(e.label for e in entries)}")
        self._run.close()
        self._report = self._run.enter_context(show_progress(self._console))

    def step(self, progress: Progress) -> None:
        """As of `quantize`."""
        self._report(progress)

    def ended(self, entry: "Entry", standing: "Standing") -> None:
        """A line for each output."""
        self._run.close()
        self._report = _nothing
        if standing.error:
            click.echo(f"{entry.label}: {_state(standing)}: {standing.error.message}", err=True)
        else:
            self._say(f"{entry.label}: done in {duration(standing.seconds)}")

    def waits(self, wait_s: float) -> None:
        """For how long nothing happens."""
        self._say(f"waiting {duration(wait_s)} before the next attempt")

    def _say(self, text: str) -> None:
        if not self._console.quiet:
            click.echo(text, err=True)


def describe_rows(rows: "Sequence[Row]") -> list[dict[str, Any]]:
    """The entries of --json."""
    return [
        {
            "label": r.entry.label,
            **asdict(r.standing),
            "recipe": r.entry.title,
            "repo": r.entry.repo,
            "up_to_date": r.look.done,
            "why": r.look.why,
            "tried": r.tried,
        }
        for r in rows
    ]


def print_rows(rows: "Sequence[Row]") -> None:
    """The summary."""
    print_table(
        ("output", "of", "state", "why"),
        [(r.entry.label, r.model.source, _state(r.standing), _why(r)) for r in rows],
    )


def _state(standing: "Standing") -> str:
    if standing.state == "waiting" and standing.error:
        return f"failed, attempt {standing.attempts}"
    return "to be made" if standing.state == "waiting" else standing.state


def _why(row: "Row") -> str:
    if row.standing.error:
        return f"{row.standing.error.type}: {row.standing.error.message}"
    if row.tried and row.standing.state == "done":
        return f"made in {duration(row.standing.seconds)}"
    return row.look.why


def _nothing(_step: Progress) -> None:
    """Between runs."""
