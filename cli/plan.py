"""`shardq plan`"""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from shardq.cli._collector import collector_paused
from shardq.cli._command import ShardqCommand, output_options
from shardq.cli._console import Console
from shardq.cli._exit_codes import RECIPE, SOURCE, epilog
from shardq.cli._fit import build_candidates, fit_options, show_fit, take_fit_options
from shardq.cli._fold import AUTO
from shardq.cli._gguf import gguf_options
from shardq.cli._options import recipe_options, take_recipe_words
from shardq.cli._plan_text import print_plans
from shardq.errors import BadOption
from shardq.sizes import parse_rate

if TYPE_CHECKING:
    from shardq.recipe import Recipe

EXAMPLES = (
    "shardq plan demo",
    "shardq plan org/name --scheme W8A16 --ignore lm_head",
    "shardq plan org/name --link 1Gbit",
    "shardq plan org/name --fit 4x80G --target vllm:tp=4 --write-recipe name.toml",
    "shardq plan --headers ./recorded --json | jq .bytes",
)


@click.command("plan", cls=ShardqCommand, epilog=epilog(EXAMPLES, (*RECIPE, *SOURCE)))
@click.argument("source", required=False)
@click.option(
    "--headers", type=click.Path(path_type=Path), metavar="DIR",
    help="Plan from recorded headers instead: a folder with headers.json.gz or an index, and config.json.",
)  # fmt: skip
@click.option("--subfolder", metavar="PATH", help="Folder inside the source that holds the checkpoint.")
@click.option("--link", metavar="RATE", help="Also say how long bytes take on a link, as 1Gbit, or 50M a second.")
@fit_options
@recipe_options
@gguf_options
@output_options
@click.pass_obj
def plan(console: Console, source: str | None, headers: Path | None, subfolder: str | None, link: str | None) -> None:
    """Say what `quantize` would do with SOURCE, from headers alone.

    Reads no weights and writes nothing: a few MB even for the largest models. Every refusal that the recipe and the
    source can cause before a weight is read is made here.
    """
    from shardq import api

    asked = take_recipe_words()
    if asked.fold == AUTO:
        raise BadOption("--fold auto reads weights, and a plan reads none: give the file that `quantize` wrote")
    space, reserve, file = take_fit_options()
    rate_bytes_s = parse_rate(link, "--link")

    def build(schemes: tuple[str, ...]) -> "list[Recipe]":
        return replace(asked, schemes=schemes).build()

    if (source is None) == (headers is None) or (headers and subfolder):
        raise BadOption("give either SOURCE, perhaps with --subfolder, or --headers DIR")
    if space is not None:
        with collector_paused():
            recipes, refused = build_candidates(space, reserve, asked.schemes, build)
            found = api.propose(
                headers or str(source), recipes, space, reserve=reserve, recorded=headers is not None,
                subfolder=subfolder, targets=asked.targets,
            )  # fmt: skip
            show_fit(console, found, refused, asked.targets, file)
        return
    recipes = asked.build()
    with collector_paused():
        if headers is None:
            planned = api.plan_many(str(source), recipes, subfolder=subfolder, targets=asked.targets)
        else:
            planned = tuple(api.plan_headers(headers, recipe, targets=asked.targets) for recipe in recipes)
        print_plans(console, planned, tensors=True, rate_bytes_s=rate_bytes_s)
