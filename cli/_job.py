"""What the commands of a job share: the words that began it, which whoever joins need not repeat."""

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import click

from shardq.cli._command import ShardqCommand
from shardq.errors import BadOption, ShardqError

_FILES: Final = ("source", "importance", "fold", "tuned", "layer_config")  # may be paths, which others find elsewhere
_KEY: Final = "shardq.job_words"


class JobCommand(ShardqCommand):
    """A command about a job: without a SOURCE it goes on with the words of the job folder. Its options `own` are of one
    machine, all others of the job."""

    own: frozenset[str] = frozenset()

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """See the class."""
        try:
            given, _, _ = self.make_parser(ctx).parse_args(list(args))
        except click.UsageError:
            given = {}  # said below
        if isinstance(folder := given.get("job"), str) and not isinstance(given.get("source"), str):
            with contextlib.suppress(ShardqError):  # said when the command asks for the job
                args = [*read_words(Path(folder)), *args]
                given, _, _ = self.make_parser(ctx).parse_args(list(args))
        ctx.meta[_KEY] = tuple(self._words(given))
        return super().parse_args(ctx, args)

    def _words(self, given: Mapping[str, Any]) -> "list[str]":
        """The words that decide the job, in the order of --help."""
        words: list[str] = []
        for param in self.params:
            value = given.get(str(param.name))
            if param.name in self.own or not isinstance(value, bool | str | list):
                continue
            if isinstance(param, click.Argument):
                words.append(_absolute(str(value)))
            elif isinstance(value, bool):
                words.append(param.opts[0] if value else param.secondary_opts[0])
            else:
                for each in value if isinstance(value, list) else [value]:
                    words += [param.opts[-1], _absolute(each) if param.name in _FILES else each]
        return words


def read_words(folder: Path) -> list[str]:
    """The words that a job was begun with; none where there is no job, or it was not begun by a command. Raises
    SourceUnreadable."""
    from shardq.nodes.folder import JobFolder

    record = JobFolder(folder).read()
    return list(record.words) if record else []


def take_words() -> tuple[str, ...]:
    """The words of the command line that decide the job."""
    words: tuple[str, ...] = click.get_current_context().meta[_KEY]
    return words


def need_source(source: str | None, folder: Path) -> str:
    """Raises BadOption where neither the command line nor the job says what to make, SourceUnreadable for a job that is
    damaged."""
    if source is None:
        read_words(folder)
        raise BadOption(
            f"{folder} holds no job that a command line began: name SOURCE and what to make of it, as for "
            "`shardq quantize`"
        )
    return source


def _absolute(word: str) -> str:
    """A path that exists, as all folders know it; any other word as it is."""
    path = Path(word)
    try:
        return str(path.absolute()) if path.exists() else word
    except OSError:  # too long for a path: JSON
        return word
