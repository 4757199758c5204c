"""`shardq tune`"""

from dataclasses import replace
from typing import TYPE_CHECKING

import click

from shardq.cli._command import ShardqCommand, output_options
from shardq.cli._console import Console
from shardq.cli._exit_codes import RECIPE, SOURCE, epilog
from shardq.cli._mixture import check_mixture, mixture_options, write_mixture
from shardq.cli._options import recipe_options, take_recipe_words
from shardq.cli._run import RUN, path_beside, run_options, run_recipes, take_run_words
from shardq.cli._tuning import DAMAGES, SUFFIX, run_measuring, run_tuning, take_options, tuning_options
from shardq.errors import BadOption, BadTuned, MissingPackage

if TYPE_CHECKING:
    from shardq.measured import Measured

EXAMPLES = (
    "shardq tune org/name --scheme W4A16 --dataset texts.jsonl -o name-W4A16",
    "shardq tune org/name --scheme W4A16@gptq --algorithm gptq --dataset self --nsamples 64 --seqlen 512",
    "shardq tune ./folder --scheme W2A16G64 --recipe best",
    "shardq tune org/name --target-bits 3.5 --options W2A16G64,W3A16G64,W4A16G64,W8A16G64 --dataset self",
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
@mixture_options
@tuning_options
@run_options
@output_options
@click.pass_obj
def tune(
    console: Console, source: str, target_bits: float | None, options: str | None, ignore_scale_bits: bool
) -> None:
    """Quantize SOURCE with codes that are tuned with data, one transformer block in memory at a time.

    Codes go into a folder beside the output, with `.tuned` behind its name, block by block; then they are packed as
    `quantize --tuned` does it. The same command resumes a run that was stopped. Of what lies outside of the blocks the
    head is tuned, too (--quant-lm-head); the rest gets the nearest codes. --max-disk counts codes and output together.
    Schemes with scales of activations (NVFP4, and those with STATIC in their names) get these here, by the largest
    inputs of each matrix, whatever the algorithm. Needs shardq[tune].

    With --target-bits the damage that each of --options would do to the predictions is measured first, on the CPU, by
    gradients with at most 16 samples of 256 tokens of the data, and goes into a file beside the output, with
    `.damages.json` behind its name; the mixture that is chosen by it goes into another one, as with `quantize`.
    """
    asked = take_recipe_words()
    if asked.search or asked.importance or asked.fold or asked.tuned or asked.rtn:
        raise BadOption(
            "tune finds codes by --algorithm: leave --search, --importance, --fold, --tuned and --rtn to `quantize`"
        )
    tuning, trust = take_options()
    words = take_run_words()
    asked = replace(asked, schemes=check_mixture(target_bits, options, ignore_scale_bits, asked.schemes, asked.layout))
    recipes = asked.build()
    if len(recipes) > 1:
        raise BadOption(
            "tune makes one output: give one --scheme and one --format, and pack others by quantize --tuned"
        )
    limits = words.limits(console)
    if target_bits is not None and options:
        from shardq.recipe_file import LAYERS

        base, path = recipes[0], path_beside(source, recipes[0], LAYERS)
        if words.dry_run and not path.exists():
            raise BadOption("--dry-run makes nothing, and a mixture is chosen by what is measured: leave it out")

        def measure() -> "Measured":
            damages = path_beside(source, base, DAMAGES)
            return run_measuring(console, source, base, damages, options or "", tuning, words.subfolder, limits, trust)

        write_mixture(console, source, words.subfolder, base, options, target_bits, ignore_scale_bits, path, measure)
        asked = replace(asked, layer_config=str(path))
        recipes = asked.build()
    if words.dry_run:
        run_recipes(console, source, recipes, asked.targets, before_tuning=True)
        return
    folder = path_beside(source, recipes[0], SUFFIX)
    found = run_tuning(console, source, recipes[0], tuning, folder, words.subfolder, limits, trust)
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
    run_recipes(console, source, replace(asked, tuned=str(folder)).build(), asked.targets, taken_bytes)
