"""Options of lm-eval's tasks, and how their figures are told."""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Final, TypeVar

import click

from shardq.cli._console import print_table
from shardq.cli._kept import add_options, dashed_option, take_kept
from shardq.errors import BadOption

if TYPE_CHECKING:
    from shardq.benchmarks import Benchmark, BenchmarkOptions

F = TypeVar("F", bound=Callable[..., Any])
_KEY: Final = "shardq.benchmarks"  # in the context: values of `benchmark_options`


def _option(name: str, **settings: Any) -> Callable[[F], F]:
    return dashed_option(_KEY, name, **settings)


def benchmark_options(function: F) -> F:
    """Options under lm-eval's names; a command finds them with `take_benchmarks`."""
    options = (
        _option("--tasks", metavar="TASK,TASK", help="Tasks of lm-evaluation-harness, as arc_easy,piqa."),
        _option(
            "--backend", type=click.Choice(["hf", "vllm"]), help="With --tasks: what loads the model. Default: hf."
        ),
        _option("--limit", type=float, metavar="N", help="With --tasks: documents of each task; below 1 a share."),
        _option("--num-fewshot", type=int, metavar="N", help="With --tasks: examples. Default: the task's own."),
        _option("--batch-size", metavar="N|auto", help="With --tasks. Default: 1."),
        _option(
            "--include-path", type=click.Path(exists=True, file_okay=False), metavar="DIR",
            help="With --tasks: a folder with tasks of your own.",
        ),
    )  # fmt: skip
    return add_options(function, options)


def take_benchmarks(dtype: str, trust_remote_code: bool) -> "BenchmarkOptions | None":
    """What `benchmark_options` stand for; None without --tasks. Raises BadOption."""
    from shardq.benchmarks import BenchmarkOptions

    words = {name: value for name, value in (take_kept(_KEY) or {}).items() if value is not None}
    if "tasks" not in words:
        if words:
            raise BadOption(f"--{min(words).replace('_', '-')} has a meaning only with --tasks")
        return None
    tasks = tuple(t.strip() for t in words.pop("tasks").split(","))
    return BenchmarkOptions(tasks, dtype=dtype, trust_remote_code=trust_remote_code, **words)


@contextlib.contextmanager
def stdout_as_stderr() -> Iterator[None]:
    """What lm-eval and engines print, their processes included, goes to stderr: stdout has the results alone."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def describe_benchmarks(found: "Sequence[Benchmark]") -> list[dict[str, Any]]:
    """As --json shows them."""
    return [asdict(b) for b in found]


def print_benchmarks(found: "Sequence[Benchmark]") -> None:
    """A table."""
    columns = ("task", "version", "filter", "shots", "metric", "value", "error", "documents")
    rows = [
        (b.task, b.version, b.filter, _shown(b.shots), b.metric, _shown(b.value), _shown(b.error), _shown(b.documents))
        for b in found
    ]
    if rows:
        print_table(columns, rows)


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)
