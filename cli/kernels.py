"""`shardq kernels`"""

import click

from shardq.cli._command import ShardqCommand, output_options
from shardq.cli._console import Console, print_json, print_table
from shardq.cli._exit_codes import epilog
from shardq.errors import KernelUnavailable

EXAMPLES = ("shardq kernels", "SHARDQ_KERNELS=avx2 shardq kernels")


@click.command("kernels", cls=ShardqCommand, epilog=epilog(EXAMPLES, (KernelUnavailable,)))
@output_options
@click.pass_obj
def kernels(console: Console) -> None:
    """List the kernel sets: which are built, which this CPU can run, which one is chosen and why."""
    from shardq.kernels import KernelChoiceError, sets

    try:
        found = sets()
    except KernelChoiceError as e:
        raise KernelUnavailable(str(e)) from e
    if console.as_json:
        rows = [{"name": s.name, "built": s.built, "usable": s.usable, "chosen": s.chosen, "why": s.why} for s in found]
        print_json({"kernels": rows})
        return
    print_table(
        ("kernels", "built", "usable", "chosen", "why"),
        ((s.name, *("yes" if x else "no" for x in (s.built, s.usable, s.chosen)), s.why) for s in found),
    )
