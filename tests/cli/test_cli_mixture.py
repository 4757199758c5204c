"""`shardq quantize --target-bits`: two passes, with a file between them."""

from collections.abc import Callable
from pathlib import Path

from click.testing import Result

from shardq import errors

Run = Callable[..., Result]
WORDS = ("--target-bits", "4.6", "--options", "W2A16G32,W4A16,W8A16", "--parallel", "1")


def test_the_choice_is_written_and_used_again(tmp_path: Path, run: Run) -> None:
    out = tmp_path / "out"
    first = run("quantize", "demo", *WORDS, "-o", out)
    assert first.exit_code == 0, first.output
    path = tmp_path / "out.layers.toml"
    assert f"written to {path}" in first.stderr
    path.write_text(path.read_text().replace('"W2A16G32"', '"W4A16"'))  # a user's own hand
    again = run("quantize", "demo", *WORDS, "-o", out, "--restart")
    assert again.exit_code == 0, again.output
    assert f"using the mixture in {path}" in again.stderr
    assert '"W2A16G32"' not in path.read_text()


def test_words_that_do_not_go_together(tmp_path: Path, run: Run) -> None:
    bad = errors.BadOption.exit_code
    assert run("quantize", "demo", "--target-bits", "4.5", "-o", tmp_path / "a").exit_code == bad
    assert run("quantize", "demo", "--options", "W2A16,W4A16", "-o", tmp_path / "b").exit_code == bad
    assert run("quantize", "demo", *WORDS, "--scheme", "W4A16", "--scheme", "W8A16").exit_code == bad
    assert run("quantize", "demo", *WORDS[:3], "W2A16G32,W4A16", "--format", "gptq,awq").exit_code == bad
