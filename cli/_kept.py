"""Options that a command takes from the context instead of its arguments: many commands share a group of them."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])


def kept_option(key: str, *words: str, **settings: Any) -> Callable[[F], F]:  # click's own way to describe an option
    """An option whose value lies in the context, in the group `key`."""

    def keep(ctx: click.Context, option: click.Parameter, value: Any) -> None:
        assert option.name
        ctx.meta.setdefault(key, {})[option.name] = value

    return click.option(*words, expose_value=False, callback=keep, **settings)


def dashed_option(key: str, name: str, *others: str, **settings: Any) -> Callable[[F], F]:
    """The same, with words joined by dashes, by underscores as other tools write them, and under other names there."""
    plain = name[2:].replace("-", "_")
    return kept_option(key, plain, *dict.fromkeys((name, f"--{plain}", *others)), **settings)


def add_options(function: F, options: Sequence[Callable[[F], F]]) -> F:
    """A command with options, in the order in which --help lists them."""
    for option in reversed(options):
        function = option(function)
    return function


def take_kept(key: str) -> dict[str, Any] | None:
    """All values of a group by name; None for a command without it."""
    words: dict[str, Any] | None = click.get_current_context().meta.get(key)
    return None if words is None else dict(words)
