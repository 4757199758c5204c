"""shardq stats, shardq eval, and quantize --calibrate."""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from shardq.errors import MissingPackage
from shardq.importance import load_importance

TEXT = " ".join(str(i * i % 89) for i in range(200))


def run(*words: str | Path) -> Result:
    return CliRunner().invoke(importlib.import_module("shardq.cli.group").commands, [str(w) for w in words])


def models() -> Any:
    pytest.importorskip("transformers", reason="transformers builds the models: pip install shardq[tune]")
    import tuned_models

    return tuned_models


@pytest.mark.parametrize("command", [["stats", "demo"], ["eval", "demo", "--text", __file__]])
def test_without_the_extra_it_is_named(command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    result = run(*command)
    assert result.exit_code == MissingPackage.exit_code
    assert "install shardq[tune]" in result.stderr


def test_stats_writes_a_file_and_tells_of_experts(tmp_path: Path) -> None:
    folder = models().make_model("qwen3_moe", tmp_path / "model")
    result = run("stats", folder, "--tokens", "8", "-o", tmp_path / "own.safetensors", "--json", "-q")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert (told["tokens"], told["data"], told["experts"]) == (8, "random ids", 24)
    assert told["never_hit"]["model.layers.0.mlp.experts"]
    assert load_importance(tmp_path / "own.safetensors").provenance.tokens == 8
    result = run("stats", folder, "--tokens", "8", "-o", tmp_path / "peer.gguf", "--format", "imatrix")
    assert result.exit_code == 0, result.output
    assert "experts were given no token" in result.stderr
    assert load_importance(tmp_path / "peer.gguf").format == "imatrix"


def test_eval_prints_figures(tmp_path: Path) -> None:
    folder = models().make_model("llama", tmp_path / "model")
    (tmp_path / "text.txt").write_text(TEXT)
    words = ("eval", folder, "--ref", folder, "--text", tmp_path / "text.txt", "--windows", "2", "--seqlen", "16")
    result = run(*words, "--json", "-q")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert (told["windows"], told["tokens"], told["kl"], told["top1"]) == (2, 30, 0, 1)
    assert told["ppl"] == told["ref_ppl"] > 1
    assert "ppl" in run(*words, "-q").stdout


def test_quantize_calibrates_first(tmp_path: Path) -> None:
    folder = models().make_model("llama", tmp_path / "model")
    out = tmp_path / "out"
    words = ("quantize", folder, "--group-size", "32", "--parallel", "1", "-o")
    result = run(*words, out, "--calibrate", "random")
    assert result.exit_code == 0, result.output
    made = tmp_path / "out.importance.safetensors"
    assert load_importance(made).provenance.tokens == 64
    result = run(*words, tmp_path / "again", "--importance", made, "-q")
    assert result.exit_code == 0, result.output
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "again" / "model.safetensors").read_bytes()
    assert "using the statistics" in run(*words, out, "--calibrate", "random").stderr
    assert run(*words, out, "--calibrate", "random", "--rtn").exit_code == 3
