"""What all commands share: --json, -v, -q, --log-file, and how errors become messages and exit codes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from shardq.cli._console import Console, describe_error, print_json
from shardq.errors import Interrupted, ShardqError
from shardq.logs import LogConfig

F = TypeVar("F", bound=Callable[..., Any])


def output_options(function: F) -> F:
    """The options that ShardqCommand takes for itself; the command gets a Console (click.pass_obj) in their place."""
    path = click.Path(dir_okay=False, path_type=Path)
    log_file = click.option("--log-file", type=path, help="Log to this file, rotated at 16 MiB; stderr gets warnings.")
    quiet = click.option("-q", "--quiet", is_flag=True, help="Print errors and the result only.")
    verbose = click.option("-v", "--verbose", count=True, help="Log more to stderr; -vv: everything.")
    as_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout, errors too.")
    return as_json(verbose(quiet(log_file(function))))


class ShardqCommand(click.Command):
    """A command that ends with the exit code of the error that it raises."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Usage errors are documents too when JSON is asked for."""
        as_json = "--json" in args  # click empties args
        try:
            return self._parse(ctx, args)
        except click.UsageError as e:
            if not as_json:
                raise
            print_json({"error": describe_error("UsageError", e.format_message(), e.exit_code)})
            ctx.exit(e.exit_code)

    def explain(self, option: str) -> str | None:
        """What to say of an option that the command does not have, where there is more to say than that."""
        del option
        return None

    def _parse(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as e:
            reason = self.explain(e.option_name)
            if reason is None:
                raise
            raise click.UsageError(reason, ctx) from e

    def invoke(self, ctx: click.Context) -> None:
        """Run the command; a ShardqError becomes a line and its exit code, anything else is a bug and passes."""
        console = _take_console(ctx.params)
        ctx.obj = console
        try:
            console.log.apply()
            super().invoke(ctx)
        except ShardqError as e:
            error: ShardqError = e
        except KeyboardInterrupt:  # before the run catches signals, or a second one during its orderly end
            error = Interrupted("interrupted: run the same command again to go on")
        else:
            return
        console.fail(error)
        ctx.exit(error.exit_code)


def _take_console(params: dict[str, Any]) -> Console:
    """Move the values of `output_options` out of a command's parameters."""
    as_json, verbose, quiet, path = (params.pop(k) for k in ("as_json", "verbose", "quiet", "log_file"))
    usual = 1 if path else 0  # a log file that holds only warnings would be of little use
    level = "error" if quiet else ("warning", "info", "debug")[min(2, max(verbose, usual))]
    return Console(as_json, verbose > 0, quiet, LogConfig(level, path.absolute() if path else None))
