"""Statistics of a command: how they are told, and those that `quantize --calibrate` makes beside its output."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from shardq.cli._apart import run_apart
from shardq.cli._console import Console
from shardq.cli._progress import block_progress

if TYPE_CHECKING:
    from shardq.limits import Limits, SpoolAs

SUFFIX: Final = ".importance.safetensors"  # of the file beside an output folder
IMATRIX_SUFFIX: Final = ".imatrix.gguf"
LESS: Final = "torch and four blocks of the model need room, and hidden states as much as --max-ram allows"
SHOWN: Final = 3  # layers told before "and N more"


def write_calibration(
    console: Console, source: str, subfolder: str | None, data: str, bits: int, path: Path, limits: "Limits",
    spool: "SpoolAs",
) -> None:  # fmt: skip
    """Make the file of importance for a scheme of `bits`; one that is there already is used as it is. Hidden states
    beyond the memory of `limits` lie beside it.

    In a process of its own; raises as `run_apart` does, and what making and writing them raises.
    """
    from shardq.importance import LOW_BITS, LOW_BITS_TOKENS

    if path.exists():
        if not console.quiet:
            click.echo(f"using the statistics in {path}; delete it to make them again", err=True)
        return
    tokens = LOW_BITS_TOKENS if bits < LOW_BITS and data == "random" else None
    given = source, subfolder, data, tokens, path, limits, spool
    told = run_apart(console, "making statistics", LESS, _write, *given)
    if not console.quiet:
        click.echo(told, err=True)


def _write(
    console: Console, source: str, subfolder: str | None, data: str, tokens: int | None, path: Path, limits: "Limits",
    spool: "SpoolAs",
) -> str:  # fmt: skip
    """Make the file, and say what is in it."""
    from shardq import quality
    from shardq.tune.library import check_packages

    check_packages()
    with block_progress(console, "statistics") as report:
        found = quality.collect_statistics(
            source, data=data, tokens=tokens, subfolder=subfolder, folder=path.parent,
            max_ram_bytes=limits.max_ram_bytes, max_disk_bytes=limits.max_disk_bytes, spool=spool, report=report,
        )  # fmt: skip
    from shardq.tune.stats import write_importance

    write_importance(found, path)
    return f"statistics of {len(found.modules)} modules from {found.provenance.tokens} tokens written to {path}"


def tell_unseen(never_hit: Mapping[str, tuple[int, ...]], counts: Mapping[str, int]) -> Iterator[str]:
    """A line for each layer with experts that the router gave no token, as far as these are few."""
    shown = list(never_hit.items())[:SHOWN]
    for prefix, experts in shown:
        yield f"{prefix}: {len(experts)} of {counts[prefix]} experts were given no token"
    if len(never_hit) > SHOWN:
        yield f"and so in {len(never_hit) - SHOWN} more layers"
