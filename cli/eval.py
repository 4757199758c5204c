"""`shardq eval`"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from shardq.cli._command import ShardqCommand, output_options
from shardq.cli._console import Console, print_json, print_pairs
from shardq.cli._exit_codes import SOURCE, epilog
from shardq.cli._progress import block_progress
from shardq.errors import MissingPackage, NonFiniteWeight

if TYPE_CHECKING:
    from shardq.tune.evaluation import Evaluation

EXAMPLES = (
    "shardq eval name-W4A16 --ref org/name --text wiki.txt",
    "shardq eval org/name --text wiki.txt --windows 32 --seqlen 2048 --dtype float32",
)


@click.command("eval", cls=ShardqCommand, epilog=epilog(EXAMPLES, (*SOURCE, MissingPackage, NonFiniteWeight)))
@click.argument("result", metavar="OUT_OR_REPO")
@click.option("--text", type=click.Path(dir_okay=False, path_type=Path), required=True, help="A text file in UTF-8.")
@click.option("--ref", "reference", metavar="SOURCE", help="What it was made of: also compare predictions with it.")
@click.option("--windows", type=int, default=8, show_default=True, metavar="N", help="Evenly spaced in the text.")
@click.option("--seqlen", type=int, default=512, show_default=True, metavar="N", help="Tokens of a window.")
@click.option(
    "--dtype", type=click.Choice(["auto", "float32", "bfloat16", "float16"]), default="auto", show_default=True,
    help="What is computed with; auto: the result's own.",
)  # fmt: skip
@click.option("--trust-remote-code", is_flag=True, help="Run code that the checkpoints bring along.")
@click.option("--subfolder", metavar="PATH", help="Folder inside --ref that holds the checkpoint.")
@output_options
@click.pass_obj
def evaluate(
    console: Console, result: str, text: Path, reference: str | None, windows: int, seqlen: int, dtype: str,
    trust_remote_code: bool, subfolder: str | None,
) -> None:  # fmt: skip
    """Perplexity of a model on a text, and with --ref how far its predictions are from its source's (KL divergence).

    OUT_OR_REPO is a folder or org/name[@revision], quantized or not. Models run block by block, so that they may be
    larger than memory; weights are decoded, activations are not quantized. GGUF files are refused. Needs shardq[tune].
    """
    from shardq import api
    from shardq.files.atomic import reading

    with reading(text):
        content = text.read_text(encoding="utf-8")
    with block_progress(console, "evaluation") as report:
        found = api.evaluate(
            result, content, reference=reference, windows=windows, seqlen=seqlen, dtype=dtype, subfolder=subfolder,
            trust_remote_code=trust_remote_code, report=report,
        )  # fmt: skip
    figures = describe(found)
    if console.as_json:
        print_json({"result": result, "reference": reference, **figures})
    else:
        print_pairs(
            [(name, f"{value:.5g}" if isinstance(value, float) else str(value)) for name, value in figures.items()]
        )


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
