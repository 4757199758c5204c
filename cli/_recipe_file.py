"""`quantize --recipe-file`: a recipe that lies in a file, instead of options."""

from pathlib import Path
from typing import Final

import click
from click.core import ParameterSource

from shardq.cli._console import Console
from shardq.cli._mixture import SUFFIX, write_mixture
from shardq.cli._run import path_beside, run_recipes, take_run_words
from shardq.errors import BadOption

_BESIDE: Final = frozenset({"source", "recipe_file", "as_json", "verbose", "quiet", "log_file"})


def run_recipe_file(console: Console, source: str, path: Path) -> None:
    """Make what the file says. Raises BadOption beside options that say so, too."""
    from shardq.recipe_file import read_recipe_file, recipe_of

    _refuse_others()
    words, mixture = read_recipe_file(path)
    written = recipe_of(words, str(path), path.parent)
    if mixture:
        chosen = path_beside(source, written.recipe, SUFFIX)
        write_mixture(
            console, source, take_run_words().subfolder, written.recipe, mixture.options, mixture.target_bits,
            mixture.ignore_scale_bits, chosen,
        )  # fmt: skip
        written = recipe_of({**words, "layer_config": str(chosen.absolute())}, str(path), path.parent)
    run_recipes(console, source, [written.recipe], written.targets)


def _refuse_others() -> None:
    context = click.get_current_context()
    allowed = _BESIDE | {"output_dir", *take_run_words().__slots__}
    for parameter in context.command.params:
        given = parameter.name and context.get_parameter_source(parameter.name) is ParameterSource.COMMANDLINE
        if given and parameter.name not in allowed:
            raise BadOption(f"--recipe-file says what to make, and {parameter.opts[0]} says it, too: give one of them")
