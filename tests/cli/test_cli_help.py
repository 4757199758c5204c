"""Every command explains itself, and nothing heavy is imported for that."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import click
import pytest
from click.testing import Result

from shardq import errors
from shardq.cli.group import COMMANDS, load_command
from shardq.patterns import Dialect
from shardq.recipe import Ragged

Run = Callable[..., Result]
NAMES = sorted(COMMANDS)
HEAVY = {"click", "rich", "numpy", "torch", "huggingface_hub"}


def error_classes(base: type[errors.ShardqError] = errors.ShardqError) -> set[type[errors.ShardqError]]:
    subclasses = {s for s in base.__subclasses__() if s.__module__ == errors.__name__}  # other tests make some too
    return subclasses.union(*(error_classes(s) for s in subclasses))


def test_commands_are_those_of_this_version() -> None:
    known = (
        "audit batch convert dequantize eval finalize formats inspect kernels plan quantize report schemes score stats"
    )
    assert " ".join(NAMES) == f"{known} tune verify worker"


@pytest.mark.parametrize("name", NAMES)
def test_help_has_examples_and_exit_codes(name: str, run: Run) -> None:
    result = run(name, "--help")
    assert result.exit_code == 0
    examples, _, codes = result.stdout.partition("Examples:")[2].partition("Exit codes:")
    assert f"shardq {name}" in examples
    assert "  0  Success." in codes
    assert "130  Interrupted" in codes


@pytest.mark.parametrize("name", NAMES)
def test_every_option_is_described_and_the_common_ones_are_there(name: str) -> None:
    options = [p for p in load_command(name).params if isinstance(p, click.Option)]
    assert [o.name for o in options if not o.help] == []
    assert {"as_json", "verbose", "quiet", "log_file"} <= {o.name for o in options}


def test_group_help_documents_every_error_class(run: Run) -> None:
    text = run("--help").stdout
    assert [e for e in error_classes() if f"{e.exit_code:>3}  {e.__name__}: " not in text] == []


def test_exit_codes_are_distinct() -> None:
    codes = [e.exit_code for e in error_classes()]
    assert len(set(codes)) == len(codes)
    assert not {0, 1, 2} & set(codes)


def test_quantize_help_names_every_choice(run: Run) -> None:
    text = run("quantize", "--help").stdout
    assert "|".join(get_args(Ragged)) in text
    assert "|".join(get_args(Dialect)) in text


def test_readme_names_every_command() -> None:
    readme = Path(__file__).parents[2] / "README.md"
    text = readme.read_text(encoding="utf-8")
    assert [name for name in NAMES if f"shardq {name}" not in text] == []


def test_version_is_printed(run: Run) -> None:
    from shardq.version import VERSION

    assert run("--version").stdout == f"shardq {VERSION}\n"


@pytest.mark.parametrize(
    ("module", "allowed"),
    [
        ("shardq.cli", set()), ("shardq.cli.group", {"click"}), ("shardq.tune.options", set()),
        ("shardq.tune.result", set()),
    ],
    ids=["console script", "group", "words of a tuning", "its result"],
)  # fmt: skip
def test_import_is_light(module: str, allowed: set[str]) -> None:
    code = f"import sys, {module}; print(*sorted({{m.partition('.')[0] for m in sys.modules}} & {HEAVY}))"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) == allowed


def test_the_command_line_keeps_numeric_libraries_to_one_thread() -> None:
    """Their idle threads would spin beside the one worker of `--parallel 1`."""
    lines = (
        "import os, sys",
        "from shardq.cli import main",
        "sys.argv = ['shardq', 'schemes']",
        "try:",
        "    main()",
        "except SystemExit:",
        "    sys.exit(os.environ.get('OPENBLAS_NUM_THREADS') != '1')",
    )
    env = {k: v for k, v in os.environ.items() if k != "OPENBLAS_NUM_THREADS"}
    subprocess.run([sys.executable, "-P", "-c", "\n".join(lines)], env=env, check=True, capture_output=True)
