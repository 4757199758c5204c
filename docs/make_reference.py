"""Makes docs/reference.md of the code: python docs/make_reference.py

Commands and options are click's, exit codes those of shardq/errors.py, schemes, layouts and file types the tables that
plans are made with. Nothing is written by hand but the sentences between the tables.
"""

import inspect
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

import click

from shardq.cli.group import COMMANDS, commands, load_command
from shardq.gguf.architectures import ARCHITECTURES
from shardq.gguf.file_types import FILE_TYPES
from shardq.layouts import LAYOUTS, LISTED, SQUARE
from shardq.layouts.base import Layout
from shardq.schemes import ACTIVATIONS, ALIASES, ALL_TOKENS, PRESETS, WHOLE_ROW, Preset, Scheme
from shardq.serving.facts import load_facts

DOCUMENT: Final = Path(__file__).with_name("reference.md")
COMMON: Final = ("as_json", "verbose", "quiet", "log_file")  # of every command
CODE: Final = re.compile(r"^ {1,4}(\d+)  (?=\S)", re.MULTILINE)
HEAD: Final = """\
# Reference

This file is made of the code by `python docs/make_reference.py`, and a test compares them. What the words mean, and
when to use what, is in the other documents: see [index.md](index.md).
"""


def make_reference() -> str:
    """The whole document."""
    parts = [HEAD, _commands(), _exit_codes(), _schemes(), _layouts(), _engines(), _gguf()]
    return "\n".join(parts)


def _commands() -> str:
    anyone = load_command(next(iter(COMMANDS)))
    common = [p for p in anyone.params if p.name in COMMON]
    links = ", ".join(f"[{name}](#shardq-{name})" for name in COMMANDS)
    text = f"## Commands\n\n{links}. All of them have:\n\n{_options(anyone, common)}"
    return "\n".join([text, *(_command(name, load_command(name)) for name in COMMANDS)])


def _command(name: str, command: click.Command) -> str:
    usage = " ".join(command.collect_usage_pieces(_context(command)))
    options = [p for p in command.params if isinstance(p, click.Option) and p.name not in COMMON]
    codes = ", ".join(sorted(CODE.findall(command.epilog or ""), key=int))
    parts = [f"### shardq {name}", f"`shardq {name} {usage}`", _paragraphs(command.help or "")]
    if options:
        parts.append(_options(command, options).rstrip())
    parts.append(f"Exit codes: {codes}.")
    return "\n\n".join(parts) + "\n"


def _options(command: click.Command, options: Iterable[click.Parameter]) -> str:
    records = (o.get_help_record(_context(command)) for o in options)
    return _table(("option", "meaning"), ((f"`{names}`", text) for names, text in filter(None, records)))


def _context(command: click.Command) -> click.Context:
    return click.Context(command, max_content_width=10_000)


def _exit_codes() -> str:
    group = inspect.cleandoc(commands.epilog or "")
    found = CODE.split("\n" + group)[1:]
    rows = ((code, " ".join(text.split())) for code, text in zip(found[::2], found[1::2], strict=True))
    return "## Exit codes\n\n" + _table(("code", "meaning"), rows)


def _schemes() -> str:
    rows = (
        (
            f"`{p.name}`", p.scheme.element, p.scheme.group_size, _served(p.scheme), p.summary,
            _codes(_layouts_of(p)), _codes(a for a, name in ALIASES.items() if name == p.name),
        )
        for p in PRESETS.values()
    )  # fmt: skip
    text = (
        "## Schemes\n\nWhat `--scheme` takes, in any case and with `-` for `_`; a group of -1 is the whole row. "
        "Integers may also be spelled\nout, as `W6A16_G64_ASYM`, `W4A16CH` (whole rows), `W5A8`. Layouts are those "
        "that hold a matrix of 4096 x 4096 under the\nscheme; `fake` holds what the codes of any of them stand for.\n\n"
    )
    names = ("scheme", "codes", "group", "activations while serving", "summary", "layouts", "other names")
    return text + _table(names, rows)


def _served(scheme: Scheme) -> str:
    """What a server does with the inputs of a matrix."""
    if not scheme.activation:
        return "16 bits"
    a = ACTIVATIONS[scheme.activation]
    if a.group_size == ALL_TOKENS:
        return f"{a.element}, one static scale"
    columns = "" if a.group_size == WHOLE_ROW else f"{a.group_size} columns of "
    more = ", rounded up" if a.exponent == "rceil" else ", below one static scale" if a.calibrated else ""
    return f"{a.element}, {a.scale} scales for {columns}a token{more}"


def _layouts_of(preset: Preset) -> list[str]:
    """Names of the layouts that hold a scheme, a packing of auto_round alone and `fake` left out."""
    wanted = (x for x in LAYOUTS if ":" not in x.name and x.name != "fake")
    return [x.name for x in wanted if _holds(x, preset)]


def _holds(layout: Layout, preset: Preset) -> bool:
    settled = layout.settle(preset.scheme)
    return layout.refuse(settled, settled, *SQUARE) is None


def _layouts() -> str:
    rows = ((f"`{x.name}`", _codes(x.aliases), x.summary, x.loaders) for x in LISTED)
    text = "## Layouts\n\nWhat `--format` takes, and who loads it.\n\n"
    return text + _table(("layout", "other names", "tensors of a module", "loaders"), rows)


def _engines() -> str:
    rows = ((f"`{e.id}`", e.version, ", ".join(sorted(e.methods))) for e in load_facts().engines)
    text = (
        "## Engines\n\nWhat `--target` takes. `plan`, `verify` and `report` judge by what is known of these "
        "versions.\n\n"
    )
    return text + _table(("engine", "version", "quantization methods that it reads"), rows)


def _gguf() -> str:
    types = _table(("file type", "summary"), ((f"`gguf:{t.name}`", t.summary) for t in FILE_TYPES))
    known = _table(("architecture", "classes"), ((f"`{a.name}`", _codes(a.classes)) for a in ARCHITECTURES))
    return f"## GGUF\n\n{types}\nModels that can be written as GGUF:\n\n{known}"


def _codes(words: Iterable[str]) -> str:
    return ", ".join(f"`{w}`" for w in words)


def _paragraphs(text: str) -> str:
    paragraphs = inspect.cleandoc(text).replace("\b\n", "").split("\n\n")
    return "\n\n".join(" ".join(p.split()) for p in paragraphs)


def _table(names: Sequence[str], rows: Iterable[Iterable[object]]) -> str:
    lines = [names, ["---"] * len(names), *([str(x).replace("|", "\\|") for x in row] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    DOCUMENT.write_text(make_reference(), encoding="utf-8")
