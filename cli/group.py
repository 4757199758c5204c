"""The command group. Adding a command is a file and a line here."""

import click

from shardq.cli._exit_codes import exit_codes
from shardq.cli.audit import audit
from shardq.cli.batch import batch
from shardq.cli.convert import convert
from shardq.cli.dequantize import dequantize
from shardq.cli.eval import evaluate
from shardq.cli.finalize import finalize
from shardq.cli.formats import formats
from shardq.cli.inspect import inspect
from shardq.cli.kernels import kernels
from shardq.cli.plan import plan
from shardq.cli.quantize import quantize
from shardq.cli.report import report
from shardq.cli.schemes import schemes
from shardq.cli.score import score
from shardq.cli.stats import stats
from shardq.cli.tune import tune
from shardq.cli.verify import verify
from shardq.cli.worker import worker
from shardq.errors import ShardqError


def _print_version(ctx: click.Context, _option: click.Parameter, wanted: bool) -> None:
    if not wanted or ctx.resilient_parsing:
        return
    from shardq.version import VERSION  # looks the installed package up: slow

    click.echo(f"shardq {VERSION}")
    ctx.exit()


@click.group(
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog=exit_codes(ShardqError.__subclasses__()),
)
@click.option(
    "--version", is_flag=True, expose_value=False, is_eager=True, callback=_print_version,
    help="Print the version and exit.",
)  # fmt: skip
def commands() -> None:
    """Quantize model checkpoints of any size, shard by shard, without a GPU, without model code, in constant memory.

    \b
    Try it without a download:
      shardq quantize demo --output-dir /tmp/demo-W4A16
    """


for _command in (
    quantize, convert, dequantize, batch, worker, finalize, plan, verify, audit, score, inspect, report, stats, tune,
    evaluate, schemes, formats, kernels,
):  # fmt: skip
    commands.add_command(_command)
