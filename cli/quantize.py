"""`shardq quantize`"""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from shardq.cli._command import ShardqCommand, output_options
from shardq.cli._console import Console
from shardq.cli._exit_codes import RECIPE, SOURCE, epilog
from shardq.cli._fold import AUTO, write_fold
from shardq.cli._fold import SUFFIX as FOLD
from shardq.cli._gguf import gguf_options
from shardq.cli._mixture import check_mixture, mixture_options, write_mixture
from shardq.cli._options import recipe_options, take_recipe_words
from shardq.cli._recipe_file import run_recipe_file
from shardq.cli._run import RUN, path_beside, run_options, run_recipes, take_run_words
from shardq.cli._spool import SPOOL, SPOOL_HELP
from shardq.cli._statistics import SUFFIX as STATISTICS
from shardq.cli._statistics import write_calibration
from shardq.cli._tuning import DAMAGES, run_measuring_for_scales
from shardq.errors import BadOption, MissingPackage, NotExact

if TYPE_CHECKING:
    from shardq.limits import SpoolAs

EXAMPLES = (
    "shardq quantize demo -o demo-W4A16",
    "shardq quantize org/name --scheme W4A16@gptq --parallel 8 --max-ram 6G",
    "shardq quantize org/name --scheme W4A16@gptq --scheme MXFP4 --scheme FP8_BLOCK -o name-quantized",
    "shardq quantize org/name --scheme gguf:q4_k_m --scheme gguf:q8_0 --imatrix name.imatrix.gguf",
    "shardq quantize ./folder --bits 8 --group-size 64 --ignore 're:.*down_proj' --dry-run",
)


@click.command(
    "quantize", cls=ShardqCommand, epilog=epilog(EXAMPLES, (*RECIPE, *SOURCE, *RUN, NotExact, MissingPackage))
)
@click.argument("source")
@recipe_options
@gguf_options
@mixture_options
@click.option(
    "--calibrate", metavar="random|self|DATASET",
    help="Make the file of --importance first: run 64 random ids (256 below 3 bits), tokens that the model samples, or "
    "texts through SOURCE, one block in memory. With --target-bits, but not with --fold, at most 16 samples of 256 "
    "tokens of the same also measure the damage to predictions, by gradients. Needs shardq[tune].",
)  # fmt: skip
@click.option("--spool", type=SPOOL, help=f"Of --calibrate. {SPOOL_HELP}")
@click.option(
    "--recipe-file", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE",
    help="Take what to make from a TOML file, as `plan --fit --write-recipe` writes it, instead of options.",
)  # fmt: skip
@run_options
@output_options
@click.pass_obj
def quantize(
    console: Console,
    source: str,
    target_bits: float | None,
    options: str | None,
    ignore_scale_bits: bool,
    calibrate: str | None,
    spool: "SpoolAs | None",
    recipe_file: Path | None,
) -> None:
    """Quantize SOURCE into a folder, or with several schemes or layouts into several, from one read.

    SOURCE is a folder, org/name[@revision], hf://org/name[@revision], or demo; it may be quantized already (FP8, MXFP4,
    NVFP4, INT4, GPTQ, AWQ, bitsandbytes, MLX). The same command resumes a run that was stopped, and a finished one
    answers that it is done. The output folder is complete or has no config.json, or for GGUF no .gguf file.
    """
    if recipe_file is not None:
        run_recipe_file(console, source, recipe_file)
        return
    asked = take_recipe_words()
    asked = replace(asked, schemes=check_mixture(target_bits, options, ignore_scale_bits, asked.schemes, asked.layout))
    words = take_run_words()
    subfolder, limits = words.subfolder, words.limits(console)
    if spool and calibrate is None:
        raise BadOption("--spool says how --calibrate keeps hidden states: leave it out, or give both")
    how = spool or "auto"
    if calibrate is not None:
        if asked.importance or asked.rtn:
            raise BadOption("--calibrate makes what --importance names, and --rtn has no use for it: give one of them")
        bases = replace(asked, fold=None).build()
        path = path_beside(source, bases[0], STATISTICS)
        least_bits = min(r.scheme.bits for r in bases)
        write_calibration(console, source, subfolder, calibrate, least_bits, path, limits, how)
        asked = replace(asked, importance=str(path))
    if asked.fold == AUTO:
        base = replace(asked, fold=None).build()[0]
        path = path_beside(source, base, FOLD)
        write_fold(console, source, subfolder, base, path)
        asked = replace(asked, fold=str(path))
    if target_bits is not None and options:
        from shardq.recipe_file import LAYERS

        (base,) = asked.build()
        path = path_beside(source, base, LAYERS)
        measure = None
        if calibrate is not None and asked.fold is None:
            damages = path_beside(source, base, DAMAGES)
            given = console, source, base, damages, options, calibrate, subfolder, limits, how
            measure = partial(run_measuring_for_scales, *given)
        write_mixture(console, source, subfolder, base, options, target_bits, ignore_scale_bits, path, measure)
        asked = replace(asked, layer_config=str(path))
    run_recipes(console, source, asked.build(), asked.targets)
