"""`shardq dequantize`"""

import click

from shardq.cli._command import ShardqCommand, output_options
from shardq.cli._console import Console
from shardq.cli._exit_codes import RECIPE, SOURCE, epilog
from shardq.cli._run import RUN, run_options, run_recipes

EXAMPLES = (
    "shardq dequantize org/name-FP8 -o name-bf16",
    "shardq dequantize ./gptq-folder --dtype F32 --dry-run",
)


@click.command("dequantize", cls=ShardqCommand, epilog=epilog(EXAMPLES, (*RECIPE, *SOURCE, *RUN)))
@click.argument("source")
@click.option(
    "--dtype", metavar="BF16|F16|F32",
    help="Type of the weights that are decoded. Default: that of the source's other weights, mostly BF16.",
)  # fmt: skip
@run_options
@output_options
@click.pass_obj
def dequantize(console: Console, source: str, dtype: str | None) -> None:
    """Write SOURCE, which is quantized, with plain weights.

    Each weight is what the source's own reader makes of it, computed in fp32 and rounded once; everything else is
    copied. Stacks of experts stay stacks, as loaders of the unquantized model want them.
    """
    from shardq.recipe import dequantize_recipe

    run_recipes(console, source, [dequantize_recipe(dtype)])
