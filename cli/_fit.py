"""`plan --fit`: which recipes have weights that fit into given memory, and the file of the best one."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from shardq.cli._console import Console, print_json, print_pairs, print_section, show_bytes
from shardq.cli._kept import add_options, kept_option, take_kept
from shardq.errors import BadOption, ShardqError

if TYPE_CHECKING:
    from shardq.fit import Fit, Proposal
    from shardq.recipe import Recipe

F = TypeVar("F", bound=Callable[..., Any])
_KEY = "shardq.fit"  # in the context: values of `fit_options`


def fit_options(function: F) -> F:
    """--fit, --fit-reserve, --write-recipe; the command finds them with `take_fit_options`."""
    options = (
        kept_option(
            _KEY, "--fit", "space", metavar="[N x]SIZE",
            help="Propose recipes whose weights fit into this memory, as 4x80G or 512G: those of --scheme, or a usual "
            "choice.",
        ),
        kept_option(
            _KEY, "--fit-reserve", "reserve", type=float, metavar="SHARE",
            help="With --fit: what is left for caches, activations and the server itself. Default: a fifth, 0.2.",
        ),
        kept_option(
            _KEY, "--write-recipe", "file", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE",
            help="With --fit: write the best as TOML, for `quantize --recipe-file` and `batch`.",
        ),
    )  # fmt: skip
    return add_options(function, options)


def take_fit_options() -> tuple[str | None, float | None, Path | None]:
    """Space, reserve and file. Raises BadOption for words that have no meaning without a space."""
    words = take_kept(_KEY) or {}
    if words["space"] is None and (words["file"] is not None or words["reserve"] is not None):
        raise BadOption("--write-recipe writes what --fit finds, in what --fit-reserve leaves: give --fit, too")
    return words["space"], words["reserve"], words["file"]


def build_candidates(
    space: str, reserve: float | None, schemes: Sequence[str], build: "Callable[[tuple[str, ...]], Sequence[Recipe]]"
) -> "tuple[list[Recipe], list[tuple[str, ShardqError]]]":
    """The recipes to try; without a scheme of the user's own a usual choice, of which some may not go with the other
    options. Raises what building a scheme of the user's raises."""
    from shardq.fit import parse_space, usual_schemes

    if schemes:
        return list(build(tuple(schemes))), []
    recipes: list[Recipe] = []
    refused: list[tuple[str, ShardqError]] = []
    for scheme in usual_schemes(parse_space(space, reserve)):
        try:
            recipes += build((scheme,))
        except ShardqError as error:
            refused.append((scheme, error))
    if not recipes:
        raise refused[0][1]
    return recipes, refused


def show_fit(
    console: Console,
    found: "Fit",
    refused: Sequence[tuple[str, ShardqError]],
    targets: Sequence[str],
    file: Path | None,
) -> None:
    """The table, or the document, and the file. Raises BadOption if a file is wanted and nothing fits."""
    best, lost = found.best, [*refused, *found.refused]
    if file is not None:
        if best is None:
            raise BadOption(
                f"nothing fits into {show_bytes(found.space.usable_bytes)}: give more memory, less --fit-reserve or "
                "schemes of fewer bits"
            )
        _write(found, best, targets, file)
    if console.as_json:
        print_json(_document(found, lost, file))
        return
    space = found.space
    each = f"{space.devices} x " if space.devices > 1 else ""
    print_pairs(
        [
            ("memory", f"{each}{show_bytes(space.each_bytes)}, {space.reserve:.0%} of it in reserve"),
            ("for weights", show_bytes(space.usable_bytes)),
            ("source", show_bytes(found.source_bytes) + (", which fits as it is" if found.source_fits else "")),
        ]
    )
    rows = [
        (
            p.title, show_bytes(p.weights_bytes), f"{p.bits:.2f}", show_bytes(p.weights_bytes / space.devices),
            ("best" if p is best else "yes") if p.fits else "no", ", ".join(p.engines),
        )
        for p in found.proposals
    ]  # fmt: skip
    print_section(("recipe", "weights", "bits", "on each", "fits", f"loads, tp={space.devices}"), rows)
    print_section(("refused", "why"), [(name, str(error)[:200]) for name, error in lost])
    if file is not None and best is not None:
        click.echo(f"{best.title} written to {file}", err=True)


def _document(found: "Fit", lost: Sequence[tuple[str, ShardqError]], file: Path | None) -> dict[str, Any]:
    from shardq.fit import recipe_words

    space, best = found.space, found.best
    return {
        "space": {
            "devices": space.devices,
            "each_bytes": space.each_bytes,
            "reserve": space.reserve,
            "usable_bytes": space.usable_bytes,
        },
        "source_bytes": found.source_bytes,
        "source_fits": found.source_fits,
        "proposals": [
            {
                "title": p.title,
                "recipe": recipe_words(p),
                "weights_bytes": p.weights_bytes,
                "bits": p.bits,
                "fits": p.fits,
                "best": p is best,
                "engines": list(p.engines),
            }
            for p in found.proposals
        ],
        "refused": [{"scheme": name, "type": type(e).__name__, "message": str(e)} for name, e in lost],
        "file": str(file) if file else None,
    }


def _write(found: "Fit", best: "Proposal", targets: Sequence[str], file: Path) -> None:
    from shardq.files.atomic import write_atomic
    from shardq.fit import recipe_words
    from shardq.recipe_file import toml_of

    space = found.space
    head = (
        f"{best.title}: {show_bytes(best.weights_bytes)} of weights, for {space.devices} x "
        f"{show_bytes(space.each_bytes)} with {space.reserve:.0%} in reserve.\n"
        "Made by `shardq plan --fit`; use it with `shardq quantize SOURCE --recipe-file FILE`, or in a manifest."
    )
    words = {**recipe_words(best), **({"target": list(targets)} if targets else {})}
    write_atomic(file, toml_of(words, head).encode())
