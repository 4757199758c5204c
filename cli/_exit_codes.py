"""Exit codes as --help shows them, taken from the error classes."""

import textwrap
from collections.abc import Iterable, Sequence
from typing import Final

from shardq.errors import (
    BadFold,
    BadGroupSize,
    BadImportance,
    BadOption,
    CheckpointIncomplete,
    CorruptShard,
    FusedGroupSplit,
    HubAccess,
    HubTransfer,
    Interrupted,
    LayoutRefuses,
    NothingToQuantize,
    NotWritable,
    PatternMatchesNothing,
    ShardqError,
    SourceUnreadable,
    TargetRefuses,
    Terminated,
    UnknownDtype,
    UnknownScheme,
    UnknownTensor,
    UnsupportedSource,
)

Errors = tuple[type[ShardqError], ...]

RECIPE: Final[Errors] = (
    BadOption,
    UnknownScheme,
    BadGroupSize,
    PatternMatchesNothing,
    LayoutRefuses,
    NothingToQuantize,
    FusedGroupSplit,
    TargetRefuses,
    BadImportance,
    BadFold,
    UnknownTensor,
    UnsupportedSource,
)
SOURCE: Final[Errors] = (
    BadOption,
    SourceUnreadable,
    CheckpointIncomplete,
    CorruptShard,
    UnknownDtype,
    UnsupportedSource,
    HubAccess,
    HubTransfer,
)

_GENERAL: Final = (
    (0, "Success."),
    (1, "A bug in shardq, with a traceback; or, silently, the reader of the output has gone away."),
    (2, "Usage: an option or argument that does not exist, or is no number."),
)
_WIDTH: Final = 96


def epilog(examples: Sequence[str], errors: Iterable[type[ShardqError]] = ()) -> str:
    """The end of a command's help: examples, and every exit code that it can give."""
    # A paragraph that starts with \b is left as it stands by click.
    return "\n".join(("\b", "Examples:", *(f"  {e}" for e in examples), "", exit_codes(errors)))


def exit_codes(errors: Iterable[type[ShardqError]]) -> str:
    """The table of exit codes: those that any command can give, and those of `errors`."""
    classes: set[type[ShardqError]] = {*errors, NotWritable, Interrupted, Terminated}
    known = (*_GENERAL, *((e.exit_code, f"{e.__name__}: {e.__doc__}") for e in classes))
    return "\n".join(("\b", "Exit codes:", *(_row(code, text) for code, text in sorted(known))))


def _row(code: int, text: str) -> str:
    return textwrap.fill(" ".join(text.split()), _WIDTH, initial_indent=f"  {code:>3}  ", subsequent_indent=" " * 7)
