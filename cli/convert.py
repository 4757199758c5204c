"""`shardq convert`"""

import click

from shardq.cli._command import ShardqCommand, output_options
from shardq.cli._console import Console
from shardq.cli._exit_codes import RECIPE, SOURCE, epilog
from shardq.cli._options import split_patterns
from shardq.cli._run import RUN, run_options, run_recipes
from shardq.errors import NotExact

EXAMPLES = (
    "shardq convert org/name-GPTQ --to awq -o name-AWQ",
    "shardq convert ./mlx-folder --to compressed-tensors --ignore lm_head --dry-run",
)


@click.command("convert", cls=ShardqCommand, epilog=epilog(EXAMPLES, (*RECIPE, *SOURCE, *RUN, NotExact)))
@click.argument("source")
@click.option("--to", "layouts", multiple=True, required=True, metavar="LAYOUT", help="See `shardq formats`.")
@click.option(
    "--ignore", multiple=True, metavar="PATTERN", help="Decode these modules instead, written as for `quantize`."
)
@click.option(
    "--sym/--asym", "symmetric", default=None,
    help="Whether all zero points are in the middle, where SOURCE does not say so itself (MLX, AWQ). It is checked.",
)  # fmt: skip
@click.option(
    "--requantize", is_flag=True,
    help="Make new codes for what may not fit as it is, from the decoded weights. Without it that is an error.",
)  # fmt: skip
@run_options
@output_options
@click.pass_obj
def convert(
    console: Console, source: str, layouts: tuple[str, ...], ignore: tuple[str, ...], symmetric: bool | None,
    requantize: bool,
) -> None:  # fmt: skip
    """Put the codes of SOURCE, which is quantized, into another layout without quantizing again.

    Codes are never changed, and every weight decodes to the same number as before: what cannot be carried so is an
    error that names it. Several --to make several outputs from one read.
    """
    from shardq.recipe import convert_recipe

    names = [name.strip() for each in layouts for name in each.split(",")]
    recipes = [
        convert_recipe(name, ignore=split_patterns(ignore), requantize=requantize, symmetric=symmetric)
        for name in names
    ]
    run_recipes(console, source, recipes)
