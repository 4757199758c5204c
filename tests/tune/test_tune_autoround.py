"""auto-round's options: what the table says is there is, what it refuses is refused by its reason, and the document is
made of it."""

import json
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from shardq.cli.group import commands
from shardq.tune.autoround_options import SAME, all_rows, as_markdown, explain

DOCUMENT = Path(__file__).parents[2] / "docs" / "autoround_options.md"


def _words() -> set[str]:
    tune = commands.get_command(click.Context(commands), "tune")
    assert tune is not None
    return {w for p in tune.params for w in (*p.opts, *p.secondary_opts)}


def test_what_is_the_same_is_there() -> None:
    words = _words()
    assert {w for r in all_rows() if r.ours == SAME for w in r.words} <= words
    assert all(any(r.ours.startswith(w) for w in words) for r in all_rows() if r.ours.startswith("--"))


def test_every_other_word_has_a_reason() -> None:
    assert all(r.ours or len(r.why) > len("not here, sorry") for r in all_rows())
    words = [w for r in all_rows() for w in r.words]
    assert len(words) == len(set(words))


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--enable_lfq",), "--enable_lfq of auto-round: the last block is learned like the others"),
        (("--svdquant-rank", "8"), "a low-rank branch"),
        (("--no-enable_quanted_input",), "is --disable_quanted_input here"),
        (("--fp_layers=head",), "is --ignore here: with `--ignore-dialect auto-round`"),
        (("--sorcery",), "No such option '--sorcery'"),
    ],
)
def test_the_command_says_why(words: tuple[str, ...], told: str, tmp_path: Path) -> None:
    found = CliRunner().invoke(commands, ["tune", str(tmp_path), *words])
    assert found.exit_code == 2
    assert told in found.output
    shown = CliRunner().invoke(commands, ["tune", str(tmp_path), *words, "--json"])
    assert told in json.loads(shown.stdout)["error"]["message"]


def test_words_that_are_there_have_nothing_to_explain() -> None:
    assert explain("--iters") is None
    assert explain("--sorcery") is None


def test_the_document_is_made_of_the_table() -> None:
    command = "python -c \"from shardq.tune.autoround_options import as_markdown; print(as_markdown(), end='')\""
    assert DOCUMENT.read_text() == as_markdown(), f"{command} > {DOCUMENT.name}"


@pytest.mark.oracle
def test_the_table_has_every_option_of_auto_round() -> None:
    parser = pytest.importorskip("auto_round.cli.parser", reason="needs auto-round 0.16.1").build_quantize_parser()
    known = {w for r in all_rows() for w in r.words}
    found = {w for a in parser._actions for w in a.option_strings} - {"-h", "--help"}
    assert found == known
