"""`shardq tune`"""

from typing import TYPE_CHECKING

import click

from shardq.cli._command import ShardqCommand, output_options
from shardq.cli._console import Console
from shardq.cli._exit_codes import RECIPE, SOURCE, epilog
from shardq.cli._options import build_recipes, recipe_options
from shardq.cli._run import RUN, path_beside, run_options, run_recipes, take_run_words
from shardq.cli._tuning import SUFFIX, run_tuning, take_options, tuning_options
from shardq.errors import BadOption, BadTuned, MissingPackage

if TYPE_CHECKING:
    from shardq.recipe import Recipe

EXAMPLES = (
    "shardq tune org/name --scheme W4A16 --dataset texts.jsonl -o name-W4A16",
    "shardq tune org/name --scheme W4A16@gptq --algorithm gptq --dataset self --nsamples 64 --seqlen 512",
    "shardq tune ./folder --scheme W2A16G64 --recipe best",
    "shardq tune org/name --scheme FP8_STATIC --algorithm rtn --dataset self --nsamples 64 --seqlen 512",
)


class TuneCommand(ShardqCommand):
    """Knows what auto-round calls its options."""

    def explain(self, option: str) -> str | None:
        """See autoround_options.py."""
        from shardq.tune.autoround_options import explain

        return explain(option)


@click.command("tune", cls=TuneCommand, epilog=epilog(EXAMPLES, (*RECIPE, *SOURCE, *RUN, BadTuned, MissingPackage)))
@click.argument("source")
@recipe_options
@tuning_options
@run_options
@output_options
@click.pass_obj
def tune(
    console: Console, source: str, schemes: tuple[str, ...], layout: str | None, bits: int | None,
    group_size: int | None, symmetric: bool | None, layer_config: str | None, ignore: tuple[str, ...],
    include: tuple[str, ...], ignore_dialect: str, quant_lm_head: bool, ragged: str, targets: tuple[str, ...],
    policy: str, mtp: str, quant_nontext: bool, decode: str, requantize: bool, search: str | None,
    importance: str | None, fold: str | None, tuned: str | None, rtn: bool,
) -> None:  # fmt: skip
    """Quantize SOURCE with codes that are tuned with data, one transformer block in memory at a time.

    Codes go into a folder beside the output, with `.tuned` behind its name, block by block; then they are packed as
    `quantize --tuned` does it. The same command resumes a run that was stopped. Of what lies outside of the blocks the
    head is tuned, too (--quant-lm-head); the rest gets the nearest codes. --max-disk counts codes and output together.
    Schemes with scales of activations (NVFP4, and those with STATIC in their names) get these here, by the largest
    inputs of each matrix, whatever the algorithm. Needs shardq[tune].
    """
    if search or importance or fold or tuned or rtn:
        raise BadOption(
            "tune finds codes by --algorithm: leave --search, --importance, --fold, --tuned and --rtn to `quantize`"
        )
    options, trust = take_options()
    words = take_run_words()

    def build(codes: str | None) -> "list[Recipe]":
        return build_recipes(
            schemes, layout, bits, group_size, symmetric, layer_config, ignore, include, ignore_dialect, quant_lm_head,
            ragged, targets, policy, mtp, quant_nontext, decode, requantize, None, None, False, None, codes,
        )  # fmt: skip

    recipes = build(None)
    if len(recipes) > 1:
        raise BadOption(
            "tune makes one output: give one --scheme and one --format, and pack others by quantize --tuned"
        )
    if words.dry_run:
        run_recipes(console, source, recipes, targets, before_tuning=True)
        return
    folder = path_beside(source, recipes[0], SUFFIX)
    limits = words.limits(console)
    found = run_tuning(console, source, recipes[0], options, folder, words.subfolder, limits, trust)
    if not console.quiet:
        click.echo(
            f"codes of {found.modules} modules, tuned with {found.tokens} tokens, are in {found.folder}", err=True
        )
    if found.left:
        console.warn(
            [f"{len(found.left)} modules are not tuned and get the nearest codes: {', '.join(found.left[:3])}"]
        )
    if found.borrowed:
        text = (
            f"{len(found.borrowed)} matrices of experts got no token, and scales of activations as their siblings "
            f"(more --nsamples may reach them): {', '.join(found.borrowed[:3])}"
        )
        console.warn([text])
    if found.unscaled:
        console.warn(
            [f"awq: nothing to scale is known in {len(found.unscaled)} blocks: {', '.join(found.unscaled[:3])}"]
        )
    taken_bytes = sum(path.stat().st_size for path in found.folder.iterdir())
    run_recipes(console, source, build(str(folder)), targets, taken_bytes)
