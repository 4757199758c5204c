"""Options of a mixture for a size, and the layer config that they lead to."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from shardq.cli._console import Console
from shardq.errors import BadOption

if TYPE_CHECKING:
    from shardq.measured import Measured
    from shardq.recipe import Recipe

F = TypeVar("F", bound=Callable[..., Any])


def mixture_options(function: F) -> F:
    """--target-bits, --options, --ignore-scale-bits."""
    options = (
        click.option(
            "--target-bits", type=float, metavar="BITS",
            help="Choose a scheme of --options for each group of modules, for this many bits for a weight in all.",
        ),
        click.option("--options", metavar="SCHEME,SCHEME", help="With --target-bits: the schemes to choose from."),
        click.option("--ignore-scale-bits", is_flag=True, help="With --target-bits: count the bits of codes alone."),
    )  # fmt: skip
    for option in reversed(options):
        function = option(function)
    return function


def check_mixture(
    target_bits: float | None, options: str | None, ignore_scale_bits: bool, schemes: tuple[str, ...],
    layout: str | None,
) -> tuple[str, ...]:  # fmt: skip
    """The schemes of the command: with a mixture its first option, unless one is given. Raises BadOption."""
    if target_bits is None:
        if options or ignore_scale_bits:
            raise BadOption("--options and --ignore-scale-bits have a meaning only with --target-bits")
        return schemes
    if not options:
        raise BadOption("--target-bits needs --options, as in --options W2A16G64,W4A16,W8A16")
    if len(schemes) > 1 or "," in (layout or ""):
        raise BadOption("--target-bits makes one output: give one --scheme and one --format")
    return schemes or (options.split(",")[0],)


def write_mixture(
    console: Console, source: str, subfolder: str | None, recipe: "Recipe", options: str, target_bits: float,
    ignore_scale_bits: bool, path: Path, measure: "Callable[[], Measured] | None" = None,
) -> None:  # fmt: skip
    """Choose, by what `measure` finds if that is given, and write the layer config; a file that is there already is
    used as it is."""
    from shardq import quality
    from shardq.files.atomic import write_atomic
    from shardq.headers import read_checkpoint
    from shardq.mixing import open_choice
    from shardq.sources import open_source

    if path.exists():
        if not console.quiet:
            click.echo(f"using the mixture in {path}; delete it to choose again", err=True)
        return
    if measure:
        choice = open_choice(read_checkpoint(open_source(source, subfolder)), recipe, options)
        choice.check(target_bits, ignore_scale_bits)  # before the model is run
    mixed = quality.mix(
        source, recipe, options=options, target_bits=target_bits, ignore_scale_bits=ignore_scale_bits,
        subfolder=subfolder, measured=measure() if measure else None,
    )  # fmt: skip
    write_atomic(path, mixed.text.encode())
    if not console.quiet:
        bits = mixed.mixture.average_bits
        click.echo(f"mixture of {bits:.4f} bits for a weight written to {path}: look at it, or change it", err=True)
