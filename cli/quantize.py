"""`shardq quantize`"""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

import click

from shardq.cli._command import ShardqCommand, output_options
from shardq.cli._console import Console, print_json
from shardq.cli._exit_codes import RECIPE, SOURCE, epilog
from shardq.cli._options import build_recipes, recipe_options
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
    from collections.abc import Sequence

    from shardq.limits import Limits
    from shardq.recipe import Recipe

EXAMPLES = (
    "shardq quantize demo -o demo-W4A16",
    "shardq quantize org/name --scheme W4A16@gptq --parallel 8 --max-ram 6G",
    "shardq quantize org/name --scheme W4A16@gptq --scheme MXFP4 --scheme FP8_BLOCK -o name-quantized",
    "shardq quantize ./folder --bits 8 --group-size 64 --ignore 're:.*down_proj' --dry-run",
)
RUN = (
    NonFiniteWeight, ChecksumMismatch, OutputOccupied, RecipeChanged, OutputLocked, DiskFull, BudgetTooSmall,
    TaskFailed, KernelUnavailable,
)  # fmt: skip


@click.command("quantize", cls=ShardqCommand, epilog=epilog(EXAMPLES, (*RECIPE, *SOURCE, *RUN)))
@click.argument("source")
@recipe_options
@click.option(
    "-o", "--output-dir", "--output_dir", type=click.Path(path_type=Path),
    help="Folder to make; with several outputs the folder that holds theirs. Default: the source's name with the "
    "scheme's behind it, in the current folder.",
)  # fmt: skip
@click.option("--subfolder", metavar="PATH", help="Folder inside the source that holds the checkpoint.")
@click.option("--parallel", type=int, metavar="N", help="Worker processes. Default: one for each core.")
@click.option("--max-ram", metavar="SIZE", help="Memory of all processes together, as 6G or 6GiB.")
@click.option("--max-disk", metavar="SIZE", help="Disk for the output and the source shards fetched ahead, as 50G.")
@click.option("--stream", is_flag=True, help="Read a Hub repo by ranges: no source shard touches the disk.")
@click.option("--xet", is_flag=True, help="Fetch with the Hub's Xet client (hf_xet) instead of plain downloads.")
@click.option(
    "--push-to",
    metavar="ORG/NAME",
    help="Upload each finished file to this Hub repo; one commit at the end. With several outputs: "
    "ORG/NAME-{scheme}-{layout}.",
)
@click.option("--private", is_flag=True, help="With --push-to: make the repo private if it has to be created.")
@click.option("--branch", metavar="NAME", help="With --push-to: commit to this branch, made if need be. Default: main.")
@click.option("--keep-local", is_flag=True, help="With --push-to: keep the output folder, too.")
@click.option("--delete-source", is_flag=True, help="Delete each shard of a source folder once its output is durable.")
@click.option("--restart", is_flag=True, help="Begin anew: discard what an earlier run left in the output folder.")
@click.option("--dry-run", is_flag=True, help="Say what would be done, and make nothing.")
@output_options
@click.pass_obj
def quantize(
    console: Console, source: str, schemes: tuple[str, ...], layout: str | None, bits: int | None,
    group_size: int | None, symmetric: bool | None, layer_config: str | None, ignore: tuple[str, ...],
    include: tuple[str, ...], ignore_dialect: str, quant_lm_head: bool, ragged: str, targets: tuple[str, ...],
    policy: str, mtp: str, quant_nontext: bool, output_dir: Path | None, subfolder: str | None,
    parallel: int | None, max_ram: str | None, max_disk: str | None,
    stream: bool, xet: bool,
    push_to: str | None, private: bool, branch: str | None, keep_local: bool, delete_source: bool, restart: bool,
    dry_run: bool,
) -> None:  # fmt: skip
    """Quantize SOURCE into a folder, or with several schemes or layouts into several, from one read.

    SOURCE is a folder, org/name[@revision], hf://org/name[@revision], or demo. The same command resumes a run that was
    stopped, and a finished one answers that it is done. The output folder is complete or has no config.json.
    """
    from shardq import api
    from shardq.limits import Limits

    recipes = build_recipes(
        schemes, layout, bits, group_size, symmetric, layer_config, ignore, include, ignore_dialect, quant_lm_head,
        ragged, targets, policy, mtp, quant_nontext,
    )  # fmt: skip
    limits = Limits(
        max_ram_bytes=parse_size(max_ram, "--max-ram"),
        max_disk_bytes=parse_size(max_disk, "--max-disk"),
        delete_source=delete_source,
        stream=stream,
        xet=xet,
        keep_local=keep_local,
        log=console.log,
    )
    if parallel is not None:
        limits = dataclasses.replace(limits, parallel=parallel)
    if dry_run:
        _show_plans(console, source, recipes, subfolder, limits, targets)
        return
    with show_progress(console) as report:
        results = api.quantize_many(
            source, recipes, output_dir=output_dir, subfolder=subfolder, limits=limits, restart=restart, report=report,
            push_to=push_to, private=private, branch=branch, targets=targets,
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
    targets: tuple[str, ...],
) -> None:  # fmt: skip
    from shardq import api
    from shardq.onepass import OnePass

    plans = api.plan_many(source, recipes, subfolder=subfolder, targets=targets)
    remote = plans[0].checkpoint.commit is not None
    limits.share_memory(OnePass(plans), remote, remote)  # refuses a --max-ram that is too small
    print_plans(console, plans, tensors=False)
