"""The command group. Adding a command is a file and a row here."""

import importlib
from typing import Final

import click

from shardq.cli._exit_codes import exit_codes
from shardq.errors import ShardqError

COMMANDS: Final = {  # name and file: its function there
    "quantize": "quantize", "convert": "convert", "dequantize": "dequantize", "batch": "batch", "worker": "worker",
    "finalize": "finalize", "plan": "plan", "verify": "verify", "audit": "audit", "score": "score",
    "inspect": "inspect", "report": "report", "stats": "stats", "tune": "tune", "eval": "evaluate",
    "schemes": "schemes", "formats": "formats", "kernels": "kernels",
}  # fmt: skip


def load_command(name: str) -> click.Command:
    """A command by its name; KeyError if there is none of this name."""
    found = getattr(importlib.import_module(f"shardq.cli.{name}"), COMMANDS[name])
    assert isinstance(found, click.Command)
    return found


class Commands(click.Group):
    """Loads a command when it is asked for: to load all takes as long as planning a small model."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names in the order of the help."""
        del ctx
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """See click.Group."""
        del ctx
        return load_command(cmd_name) if cmd_name in COMMANDS else None


def _print_version(ctx: click.Context, _option: click.Parameter, wanted: bool) -> None:
    if not wanted or ctx.resilient_parsing:
        return
    from shardq.version import VERSION  # looks the installed package up: slow

    click.echo(f"shardq {VERSION}")
    ctx.exit()


@click.group(
    cls=Commands,
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
