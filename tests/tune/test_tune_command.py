"""`shardq tune`: from a folder to an output that passes its checks, and words that are refused before."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

pytest.importorskip("transformers", reason="block mode needs transformers")

import tuned_models as models

from shardq.cli.group import commands
from shardq.errors import BadOption, BudgetTooSmall

WORDS = (
    "--scheme", "W4A16", "--group-size", "32", "--format", "gptq", "--algorithm", "gptq", "--dataset", "random",
    "--nsamples", "4", "--seqlen", "16", "--parallel", "1",
)  # fmt: skip


def _run(*words: str) -> Any:
    return CliRunner().invoke(commands, list(words), catch_exceptions=False)


def test_codes_are_tuned_and_packed(tmp_path: Path) -> None:
    source, out = models.make_model("llama", tmp_path / "source"), tmp_path / "out"
    made = _run("tune", str(source), *WORDS, "-o", str(out), "--json")
    assert made.exit_code == 0, made.output
    assert (tmp_path / "out.tuned" / "tuned.json").exists()
    identity = json.loads((tmp_path / "out.tuned" / "tuned.json").read_text())["identity"]
    assert identity["algorithm"] == "gptq"
    assert identity["data"] == {"dataset": "random", "nsamples": 4, "seqlen": 16, "seed": 42}
    checked = _run("verify", str(out), "--deep", "--source", str(source))
    assert checked.exit_code == 0, checked.output


def test_scales_and_codes_are_tuned_and_packed(tmp_path: Path) -> None:
    source, out = models.make_model("llama", tmp_path / "source"), tmp_path / "out"
    more = ("--awq-n-grid", "4", "--awq_duo_scaling", "both", "--awq-apply-clip", "--iters", "2")
    made = _run("tune", str(source), *WORDS, "--algorithm", "awq,signround", *more, "-o", str(out), "--json")
    assert made.exit_code == 0, made.output
    identity = json.loads((tmp_path / "out.tuned" / "tuned.json").read_text())["identity"]
    assert identity["algorithm"] == "awq,signround"
    assert identity["awq"] == {
        "awq_n_grid": 4, "awq_duo_scaling": "both", "awq_loss": "inputs", "awq_seqlen": 512,
        "awq_apply_clip": True, "awq_clip_as_init": False, "awq_codes": "nearest",
    }  # fmt: skip
    checked = _run("verify", str(out), "--deep", "--source", str(source))
    assert checked.exit_code == 0, checked.output


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (("--rtn",), "--algorithm"),
        (("--search", "auto"), "--algorithm"),
        (("--scheme", "W8A16"), "one output"),
        (("--iters", "3"), "--iters has a meaning for --algorithm signround"),
    ],
)
def test_words_without_a_meaning_are_refused(more: tuple[str, ...], told: str, tmp_path: Path) -> None:
    found = _run("tune", str(tmp_path), *WORDS, *more)
    assert found.exit_code == BadOption.exit_code
    assert told in found.output


def test_words_of_auto_round_and_a_head(tmp_path: Path) -> None:
    source, out = models.make_model("tied", tmp_path / "source"), tmp_path / "out"
    words = (
        "--scheme", "W4A16G32", "--recipe", "light", "--iter", "2", "--bs", "2", "--nsample", "4", "--seq_len", "16",
        "--dataset", "random", "--nblocks", "2", "--quant-lm-head", "--device_map", "cpu", "--disable_amp",
        "--low_gpu_mem_usage", "--max-disk", "10M", "--parallel", "1",
    )  # fmt: skip
    made = _run("tune", str(source), *words, "-o", str(out), "--json")
    assert made.exit_code == 0, made.output
    assert "are not tuned" not in made.output
    identity = json.loads((tmp_path / "out.tuned" / "tuned.json").read_text())["identity"]
    assert (identity["dtype"], identity["signround"]["nblocks"], identity["signround"]["lr"]) == ("float32", 2, 5e-3)
    assert "compute" not in identity
    assert "device" not in identity
    checked = _run("verify", str(out), "--deep", "--source", str(source))
    assert checked.exit_code == 0, checked.output
    taken = sum(p.stat().st_size for p in (tmp_path / "out.tuned").iterdir())
    shutil.rmtree(out)
    small = _run("tune", str(source), *words, "--max-disk", str(taken + 12000), "-o", str(out))
    assert small.exit_code == BudgetTooSmall.exit_code, small.output  # codes and the output count together
    assert "tuning needs" not in small.output


def test_a_dry_run_makes_nothing(tmp_path: Path) -> None:
    source = models.make_model("llama", tmp_path / "source")
    found = _run("tune", str(source), *WORDS, "-o", str(tmp_path / "out"), "--dry-run")
    assert found.exit_code == 0, found.output
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]
