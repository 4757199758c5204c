"""`shardq eval`"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from shardq.cli._benchmarks import (
    benchmark_options,
    describe_benchmarks,
    print_benchmarks,
    stdout_as_stderr,
    take_benchmarks,
)
from shardq.cli._command import ShardqCommand, output_options
from shardq.cli._console import Console, print_json, print_pairs
from shardq.cli._exit_codes import SOURCE, epilog
from shardq.cli._progress import block_progress
from shardq.cli._spool import spool_options
from shardq.errors import (
    BadOption,
    BudgetTooSmall,
    DiskFull,
    MissingPackage,
    NonFiniteWeight,
    TargetRefuses,
    TaskFailed,
)
from shardq.sizes import parse_size

if TYPE_CHECKING:
    from collections.abc import Sequence

    from shardq.benchmarks import Benchmark
    from shardq.limits import SpoolAs
    from shardq.tune.evaluation import Evaluation

EXAMPLES = (
    "shardq eval name-W4A16 --ref org/name --text wiki.txt",
    "shardq eval org/name --text wiki.txt --windows 32 --seqlen 2048 --dtype float32",
    "shardq eval name-W4A16 --tasks arc_easy,piqa --limit 200 --batch-size 8",
)


@click.command(
    "eval",
    cls=ShardqCommand,
    epilog=epilog(
        EXAMPLES, (*SOURCE, MissingPackage, NonFiniteWeight, BudgetTooSmall, DiskFull, TargetRefuses, TaskFailed)
    ),
)
@click.argument("result", metavar="OUT_OR_REPO")
@click.option("--text", type=click.Path(dir_okay=False, path_type=Path), help="A text file in UTF-8.")
@click.option("--ref", "reference", metavar="SOURCE", help="What it was made of: also compare predictions with it.")
@click.option("--windows", type=int, default=8, show_default=True, metavar="N", help="Evenly spaced in the text.")
@click.option("--seqlen", type=int, default=512, show_default=True, metavar="N", help="Tokens of a window.")
@click.option(
    "--dtype", type=click.Choice(["auto", "float32", "bfloat16", "float16"]), default="auto", show_default=True,
    help="What is computed with; auto: the result's own.",
)  # fmt: skip
@spool_options("in the current folder")
@click.option("--trust-remote-code", is_flag=True, help="Run code that the checkpoints bring along.")
@click.option("--subfolder", metavar="PATH", help="Folder inside --ref that holds the checkpoint.")
@benchmark_options
@output_options
@click.pass_obj
def evaluate(
    console: Console, result: str, text: Path | None, reference: str | None, windows: int, seqlen: int, dtype: str,
    max_ram: str | None, max_disk: str | None, spool: "SpoolAs", trust_remote_code: bool, subfolder: str | None,
) -> None:  # fmt: skip
    """Perplexity of a model on a text, and with --ref how far its predictions are from its source's (KL divergence);
    with --tasks what lm-evaluation-harness says of it.

    OUT_OR_REPO is a folder or org/name[@revision], quantized or not. On a text models run block by block, so that they
    may be larger than memory; weights are decoded, activations are not quantized. GGUF files are refused. Needs
    shardq[tune]. Tasks need the package lm-eval, and a model that fits the machine; what the backend is known not to
    load is refused.
    """
    tasks = take_benchmarks(dtype, trust_remote_code)
    if text is None and (reference or tasks is None):
        raise BadOption("--ref compares on a text: add --text" if reference else "eval needs --text or --tasks")
    limits = parse_size(max_ram, "--max-ram"), parse_size(max_disk, "--max-disk"), spool
    document: dict[str, Any] = {"result": result, "reference": reference}
    found: Sequence[Benchmark] = ()
    if tasks is not None:  # first: what the backend will not load is refused before the text takes its time
        from shardq.benchmarks import run_benchmarks

        with stdout_as_stderr():
            found = run_benchmarks(result, tasks)
    figures: dict[str, Any] = {}
    if text is not None:
        figures = _judge(console, result, text, reference, windows, seqlen, dtype, limits, trust_remote_code, subfolder)
    if console.as_json:
        print_json({**document, **figures, **({"tasks": describe_benchmarks(found)} if tasks else {})})
        return
    if figures:
        print_pairs(
            [(name, f"{value:.5g}" if isinstance(value, float) else str(value)) for name, value in figures.items()]
        )
    print_benchmarks(found)


def _judge(
    console: Console, result: str, text: Path, reference: str | None, windows: int, seqlen: int, dtype: str,
    limits: "tuple[int | None, int | None, SpoolAs]", trust_remote_code: bool, subfolder: str | None,
) -> dict[str, Any]:  # fmt: skip
    from shardq import quality
    from shardq.files.atomic import reading

    with reading(text):
        content = text.read_text(encoding="utf-8")
    max_ram_bytes, max_disk_bytes, spool = limits
    with block_progress(console, "evaluation") as report:
        found = quality.evaluate(
            result, content, reference=reference, windows=windows, seqlen=seqlen, dtype=dtype, subfolder=subfolder,
            max_ram_bytes=max_ram_bytes, max_disk_bytes=max_disk_bytes, spool=spool,
            trust_remote_code=trust_remote_code, report=report,
        )  # fmt: skip
    return describe(found)


def describe(found: "Evaluation") -> dict[str, Any]:
    """Figures by name."""
    figures: dict[str, Any] = {
        "windows": found.windows,
        "tokens": found.tokens,
        "ppl": found.ppl,
        "nll_se": found.nll_se,
    }
    if (d := found.distance) is not None:
        figures |= {
            "ref_ppl": d.reference_ppl,
            "kl": d.kl,
            "kl_se": d.kl_se,
            "kl_p99": d.kl_p99,
            "top1": d.top1,
        }
    return figures
