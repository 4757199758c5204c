"""What all commands that make an output share: where it goes, what it may take, and how the run is shown."""

import dataclasses
import gc
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import click

from shardq.cli._console import Console, print_json
from shardq.cli._kept import add_options, kept_option, take_kept
from shardq.cli._plan_text import print_plans
from shardq.cli._progress import show_progress
from shardq.cli._result_text import describe_result, print_result
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
from shardq.sizes import parse_rate, parse_size

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

    output_dir: Path | None = None
    subfolder: str | None = None
    parallel: int | None = None
    max_ram: str | None = None
    max_disk: str | None = None
    stream: bool = False
    max_rate: str | None = None
    xet: bool = False
    push_to: str | None = None
    private: bool = False
    branch: str | None = None
    keep_local: bool = False
    delete_source: bool = False
    restart: bool = False
    dry_run: bool = False

    def limits(self, console: Console) -> "Limits":
        """Raises BadOption."""
        from shardq.limits import Limits

        limits = Limits(
            max_ram_bytes=parse_size(self.max_ram, "--max-ram"),
            max_disk_bytes=parse_size(self.max_disk, "--max-disk"),
            delete_source=self.delete_source,
            stream=self.stream,
            max_rate_bytes_s=parse_rate(self.max_rate, "--max-rate"),
            xet=self.xet,
            keep_local=self.keep_local,
            log=console.log,
        )
        return limits if self.parallel is None else dataclasses.replace(limits, parallel=self.parallel)


_NAMES: Final = tuple(f.name for f in dataclasses.fields(RunWords))


def _option(*words: str, **settings: Any) -> Callable[[F], F]:
    return kept_option(_KEY, *words, **settings)


def run_options(function: F, without: Collection[str] = ()) -> F:
    """Options that decide no output byte, but for those `without` which a command does; it finds them with
    `take_run_words`."""
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
        _option("--max-rate", metavar="RATE", help="Of downloads, and of uploads, in a second: 50M, or 400Mbit."),
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
    return add_options(function, [o for name, o in zip(_NAMES, options, strict=True) if name not in without])


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
    gc.freeze()  # all that is loaded stays: looking for garbage among it took 0.06 CPU-s a run
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
