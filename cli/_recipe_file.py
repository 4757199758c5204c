"""`quantize --recipe-file`: a recipe that lies in a file, instead of options."""

from pathlib import Path
from typing import Final

import click
from click.core import ParameterSource

from shardq.cli._console import Console
from shardq.cli._mixture import write_mixture
from shardq.cli._run import path_beside, run_recipes, take_run_words
from shardq.errors import BadOption

_BESIDE: Final = frozenset({"source", "recipe_file", "as_json", "verbose", "quiet", "log_file"})


def run_recipe_file(console: Console, source: str, path: Path) -> None:
    """Make what the file says. Raises BadOption beside options that say so, too."""
    from shardq.recipe_file import LAYERS, read_recipe_file, with_layers

    _refuse_others()
    written = read_recipe_file(path)
    recipe = written.recipe
    if mixture := written.mixture:
        chosen = path_beside(source, recipe, LAYERS)
        write_mixture(
            console, source, take_run_words().subfolder, recipe, mixture.options, mixture.target_bits,
            mixture.ignore_scale_bits, chosen,
        )  # fmt: skip
        recipe = with_layers(recipe, chosen)
    run_recipes(console, source, [recipe], written.targets)


def _refuse_others() -> None:
    context = click.get_current_context()
    allowed = _BESIDE | {"output_dir", *take_run_words().__slots__}
    for parameter in context.command.params:
        given = parameter.name and context.get_parameter_source(parameter.name) is ParameterSource.COMMANDLINE
        if given and parameter.name not in allowed:
            raise BadOption(f"--recipe-file says what to make, and {parameter.opts[0]} says it, too: give one of them")
