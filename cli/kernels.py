"""`shardq kernels`"""

import dataclasses
import os
from typing import TYPE_CHECKING

import click

from shardq.cli._command import ShardqCommand, output_options
from shardq.cli._console import Console, print_json, print_table
from shardq.cli._exit_codes import epilog
from shardq.errors import DiskFull, KernelUnavailable

if TYPE_CHECKING:
    from shardq.kernels import SetInfo

EXAMPLES = ("shardq kernels", "SHARDQ_KERNELS=avx2 shardq kernels", "shardq kernels --bench")


@click.command("kernels", cls=ShardqCommand, epilog=epilog(EXAMPLES, (KernelUnavailable, DiskFull)))
@click.option(
    "--bench", is_flag=True,
    help="Measure how fast this machine is, in a few seconds, and keep that in your cache folder: `plan` then tells "
    "CPU time.",
)  # fmt: skip
@output_options
@click.pass_obj
def kernels(console: Console, bench: bool) -> None:
    """List the kernel sets: which are built, which this CPU can run, which one is chosen and why."""
    from shardq.kernels import KernelChoiceError, sets

    if bench:
        _bench(console)
        return
    try:
        found = sets()
    except KernelChoiceError as e:
        raise KernelUnavailable(str(e)) from e
    if console.as_json:
        rows = [
            {"name": s.name, "built": s.built, "usable": s.usable, "chosen": s.chosen, "why": _why(s)} for s in found
        ]
        print_json({"kernels": rows})
        return
    print_table(
        ("kernels", "built", "usable", "chosen", "why"),
        ((s.name, *("yes" if x else "no" for x in (s.built, s.usable, s.chosen)), _why(s)) for s in found),
    )


def _bench(console: Console) -> None:
    """A line for each family of work, and where the record is."""
    from shardq.speed import write_speed
    from shardq.speed_bench import measure_speed

    speed = measure_speed()
    path = write_speed(speed)
    if console.as_json:
        print_json({"speed": dataclasses.asdict(speed), "file": str(path)})
        return
    if not console.quiet:
        print_table(("work", "ns of one core"), ((family, f"{ns:.2f}") for family, ns in speed.ns.items()))
        click.echo(f"of a weight, or a byte that is hashed or copied; kept in {path}", err=True)


def _why(info: "SetInfo") -> str:
    """Why a set cannot be used, or why it is the one that is."""
    if not info.chosen:
        return info.why
    from shardq.kernels.choice import ENVIRONMENT_NAME

    return f"{ENVIRONMENT_NAME} names it" if os.environ.get(ENVIRONMENT_NAME) else "the fastest that this CPU runs"
