"""`shardq quantize --fold`: two passes, with a file between them."""

import json
from collections.abc import Callable
from pathlib import Path

from click.testing import Result

from shardq import errors
from shardq.fold import FOLD, read_fold

Run = Callable[..., Result]


def test_the_fold_is_written_used_again_and_recorded(tmp_path: Path, run: Run) -> None:
    out, path = tmp_path / "out", tmp_path / "out.fold.zst"
    first = run("quantize", "demo", "--fold", "auto", "--parallel", "1", "-o", out)
    assert first.exit_code == 0, first.output
    assert f"fold of 6 norms and 14 pairs written to {path}" in first.stderr
    assert read_fold(path).exponents == read_fold(out / FOLD).exponents
    again = run("quantize", "demo", "--fold", "auto", "--parallel", "1", "-o", out)
    assert again.exit_code == 0, again.output
    assert f"using the fold in {path}" in again.stderr
    assert "already" in again.output
    given = run("quantize", "demo", "--fold", path, "--parallel", "1", "-o", tmp_path / "given", "--json")
    assert given.exit_code == 0, given.output
    there, here = (json.loads((f / "shardq.json").read_text()) for f in (out, tmp_path / "given"))
    assert there["files"] == here["files"]


def test_a_mixture_is_scored_as_it_is_folded(tmp_path: Path, run: Run) -> None:
    words = ("--target-bits", "4.6", "--options", "W2A16G32,W4A16,W8A16", "--parallel", "1", "--fold", "auto")
    made = run("quantize", "demo", *words, "-o", tmp_path / "out")
    assert made.exit_code == 0, made.output
    assert (tmp_path / "out.fold.zst").exists()
    assert (tmp_path / "out.layers.toml").exists()


def test_words_that_cannot_be(tmp_path: Path, run: Run) -> None:
    assert run("plan", "demo", "--fold", "auto").exit_code == errors.BadOption.exit_code
    missing = run("quantize", "demo", "--fold", tmp_path / "none.zst", "-o", tmp_path / "a")
    assert missing.exit_code == errors.SourceUnreadable.exit_code
    (tmp_path / "wrong.zst").write_bytes(b"no fold")
    wrong = run("plan", "demo", "--fold", tmp_path / "wrong.zst")
    assert wrong.exit_code == errors.BadFold.exit_code
    assert "wrong.zst" in wrong.output + wrong.stderr
