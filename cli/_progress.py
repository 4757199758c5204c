"""Progress on stderr: a bar on a terminal, elsewhere a line for each finished shard, or for each tenth of the work."""

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import click

from shardq.cli._console import Console, show_bytes, show_share
from shardq.progress import Progress, Report


@contextlib.contextmanager
def show_progress(console: Console) -> Iterator[Report]:
    """What a run reports to. Log lines would tear a bar apart, so -v gets lines too."""
    if console.quiet:
        yield _nothing
    elif sys.stderr.isatty() and os.environ.get("TERM") != "dumb" and not console.verbose:
        with _bar() as report:
            yield report
    else:
        yield _lines()


@contextlib.contextmanager
def tenths_progress(console: Console, describe: Callable[[int, int], str]) -> Iterator[Callable[[int, int], None]]:
    """What work that knows its size reports to: a line for each tenth, or on a terminal one that changes."""
    tenths = {0} if not console.quiet else set(range(11))
    on_terminal = sys.stderr.isatty() and not console.quiet and not console.verbose

    def report(done: int, whole: int) -> None:
        tenth = 10 * done // max(1, whole)
        if on_terminal:
            click.echo(f"\r{describe(done, whole)}\x1b[K", err=True, nl=done == whole)
        elif tenth not in tenths:
            tenths.add(tenth)
            click.echo(describe(done, whole), err=True)

    yield report


def block_progress(console: Console, what: str) -> AbstractContextManager[Callable[[int, int], None]]:
    """The same for work that goes block by block."""
    return tenths_progress(console, lambda done, blocks: f"{what}: block {done} of {blocks}")


def pace(step: Progress, elapsed_s: float) -> str:
    """Bytes, rate and time left: `1.2/2.7 GB  925.0 MB/s  ETA 2s`.

    What an earlier run had done counts as done, but not for the rate. Without a rate there is no estimate.
    """
    share = show_share(step.done_bytes, step.total_bytes)
    moved_bytes = step.done_bytes - step.resumed_bytes
    if moved_bytes <= 0 or elapsed_s <= 0:
        return share
    rate = moved_bytes / elapsed_s
    left_s = (step.total_bytes - step.done_bytes) / rate
    return f"{share}  {show_bytes(rate)}/s  ETA {duration(left_s)}"


def duration(duration_s: float) -> str:
    """`2s`, `3m20s`, `5h07m`, rounded up to a whole second."""
    whole_s = -int(-duration_s // 1)
    if whole_s < 60:
        return f"{whole_s}s"
    if whole_s < 3600:
        return f"{whole_s // 60}m{whole_s % 60:02d}s"
    return f"{whole_s // 3600}h{whole_s % 3600 // 60:02d}m"


def _nothing(_step: Progress) -> None:
    """For -q."""


def _lines() -> Report:
    began_s = time.monotonic()

    def report(step: Progress) -> None:
        nonlocal began_s
        if step.stage == "start":
            began_s = time.monotonic()  # the time that headers took says nothing about the weights
            if step.resumed_bytes:
                click.echo(f"resuming: {step.done_files}/{step.total_files} shards are done", err=True)
        elif step.stage == "file":
            rest = pace(step, time.monotonic() - began_s)
            click.echo(f"shard {step.done_files}/{step.total_files} {step.item}  {rest}", err=True)
        elif step.stage == "upload":
            click.echo(f"uploaded {step.item}", err=True)

    return report


def _description(step: Progress) -> str:
    """`shards 3/8`, and what has been downloaded and uploaded: the bar counts quantized bytes only."""
    fetched = f", {show_bytes(step.fetched_bytes)} fetched" if step.fetched_bytes else ""
    uploaded = f", {show_bytes(step.uploaded_bytes)} uploaded" if step.uploaded_bytes else ""
    return f"shards {step.done_files}/{step.total_files}{fetched}{uploaded}"


@contextlib.contextmanager
def _bar() -> Iterator[Report]:
    from rich import progress
    from rich.console import Console as RichConsole

    began_s = time.monotonic()
    with progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.TextColumn("{task.fields[pace]}"),
        console=RichConsole(stderr=True),
        transient=True,
    ) as bars:
        task = bars.add_task("reading headers", total=None, pace="")

        def report(step: Progress) -> None:
            nonlocal began_s
            if step.stage == "start":
                began_s = time.monotonic()
            bars.update(
                task,
                description=_description(step),
                completed=step.done_bytes,
                total=step.total_bytes,
                pace=pace(step, time.monotonic() - began_s),
            )

        yield report
