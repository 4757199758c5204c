"""What all commands that make an output share: where it goes, what it may take, and how the run is shown."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import click

from shardq.cli._console import Console, print_json
from shardq.cli._kept import add_options, kept_option, take_kept
from shardq.cli._plan_text import print_plans
from shardq.cli._progress import show_progress
from shardq.cli._result_text import describe_result, print_result
from shardq.cli._sizes import parse_size
from shardq.errors import (
    BudgetTooSmall,
    ChecksumMismatch,
    DiskFull,
    KernelUnavailable,
    NonFiniteWeight,
    OutputLocked,
    OutputOccupied,
    RecipeChanged,
    TaskFailed,
)

if TYPE_CHECKING:
    from shardq.limits import Limits
    from shardq.recipe import Recipe

F = TypeVar("F", bound=Callable[..., Any])
RUN: Final = (
    NonFiniteWeight, ChecksumMismatch, OutputOccupied, RecipeChanged, OutputLocked, DiskFull, BudgetTooSmall,
    TaskFailed, KernelUnavailable,
)  # fmt: skip
_KEY: Final = "shardq.run"  # in the context: values of `run_options`


@dataclasses.dataclass(frozen=True, slots=True)
class RunWords:
    """The values of `run_options`."""

    output_dir: Path | None
    subfolder: str | None
    parallel: int | None
    max_ram: str | None
    max_disk: str | None
    stream: bool
    xet: bool
    push_to: str | None
    private: bool
    branch: str | None
    keep_local: bool
    delete_source: bool
    restart: bool
    dry_run: bool

    def limits(self, console: Console) -> "Limits":
        """Raises BadOption."""
        from shardq.limits import Limits

        limits = Limits(
            max_ram_bytes=parse_size(self.max_ram, "--max-ram"),
            max_disk_bytes=parse_size(self.max_disk, "--max-disk"),
            delete_source=self.delete_source,
            stream=self.stream,
            xet=self.xet,
            keep_local=self.keep_local,
            log=console.log,
        )
        return limits if self.parallel is None else dataclasses.replace(limits, parallel=self.parallel)


def _option(*words: str, **settings: Any) -> Callable[[F], F]:
    return kept_option(_KEY, *words, **settings)


def run_options(function: F) -> F:
    """Options that decide no output byte; a command finds them with `take_run_words`."""
    options = (
        _option(
            "-o", "--output-dir", "--output_dir", type=click.Path(path_type=Path),
            help="Folder to make; with several outputs the folder that holds theirs. Default: the source's name with "
            "the scheme's behind it, in the current folder.",
        ),
        _option("--subfolder", metavar="PATH", help="Folder inside the source that holds the checkpoint."),
        _option("--parallel", type=int, metavar="N", help="Worker processes. Default: one for each core."),
        _option("--max-ram", metavar="SIZE", help="Memory of all processes together, as 6G or 6GiB."),
        _option("--max-disk", metavar="SIZE", help="Disk for the output and the source shards fetched ahead, as 50G."),
        _option("--stream", is_flag=True, help="Read a Hub repo by ranges: no source shard touches the disk."),
        _option("--xet", is_flag=True, help="Fetch with the Hub's Xet client (hf_xet) instead of plain downloads."),
        _option(
            "--push-to", metavar="ORG/NAME",
            help="Upload each finished file to this Hub repo; one commit at the end. With several outputs: "
            "ORG/NAME-{scheme}-{layout}.",
        ),
        _option("--private", is_flag=True, help="With --push-to: make the repo private if it has to be created."),
        _option(
            "--branch", metavar="NAME", help="With --push-to: commit to this branch, made if need be. Default: main."
        ),
        _option("--keep-local", is_flag=True, help="With --push-to: keep the output folder, too."),
        _option(
            "--delete-source", is_flag=True, help="Delete each shard of a source folder once its output is durable."
        ),
        _option(
            "--restart", is_flag=True, help="Begin anew: discard what an earlier run left in the output folder."
        ),
        _option("--dry-run", is_flag=True, help="Say what would be done, and make nothing."),
    )  # fmt: skip
    return add_options(function, options)


def take_run_words() -> RunWords:
    """What the user gave for `run_options`."""
    return RunWords(**(take_kept(_KEY) or {}))


def path_beside(source: str, recipe: "Recipe", suffix: str) -> Path:
    """A file beside the output folder."""
    path = take_run_words().output_dir or Path(f"{Path(source).name.partition('@')[0]}-{recipe.scheme_name}")
    return path.with_name(path.name + suffix)


def run_recipes(
    console: Console, source: str, recipes: "Sequence[Recipe]", targets: tuple[str, ...] = (), taken_bytes: int = 0,
    before_tuning: bool = False,
) -> None:  # fmt: skip
    """Make the outputs, or with --dry-run say what that would be, `before_tuning` of what would be tuned first.
    `taken_bytes`: of --max-disk, what lies there already and stays."""
    from shardq import api

    words = take_run_words()
    limits = words.limits(console)
    if limits.max_disk_bytes is not None:
        limits = dataclasses.replace(limits, max_disk_bytes=max(0, limits.max_disk_bytes - taken_bytes))
    if words.dry_run:
        _show_plans(console, source, recipes, words.subfolder, limits, targets, before_tuning)
        return
    with show_progress(console) as report:
        results = api.quantize_many(
            source, recipes, output_dir=words.output_dir, subfolder=words.subfolder, limits=limits,
            restart=words.restart, report=report, push_to=words.push_to, private=words.private, branch=words.branch,
            targets=targets,
        )  # fmt: skip
    if console.as_json:
        described = [describe_result(r) for r in results]
        print_json(described[0] if len(described) == 1 else {"outputs": described})
    elif not console.quiet:
        for result in results:
            print_result(result)
    console.warn(results[0].warnings)


def _show_plans(
    console: Console, source: str, recipes: "Sequence[Recipe]", subfolder: str | None, limits: "Limits",
    targets: tuple[str, ...], before_tuning: bool,
) -> None:  # fmt: skip
    from shardq import api
    from shardq.onepass import OnePass

    plans = api.plan_many(source, recipes, subfolder=subfolder, targets=targets, before_tuning=before_tuning)
    remote = plans[0].checkpoint.commit is not None
    limits.share_memory(OnePass(plans), remote, remote)  # refuses a --max-ram that is too small
    print_plans(console, plans, tensors=False)
