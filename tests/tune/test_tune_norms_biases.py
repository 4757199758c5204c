"""Norms and biases learned beside rounding: what is written of them is what the loss saw, through to the output."""

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

pytest.importorskip("transformers", reason="block mode needs transformers")

import tuned_models as models

from shardq.cli.group import commands
from shardq.tune.awq_sites import Plain
from shardq.tune.norms_biases import FreeUnit
from shardq.tune.rounding import Learned
from shardq.tuned import load_tuned


def _unit(weight: torch.Tensor, v: torch.Tensor, stored: torch.dtype = torch.float32) -> FreeUnit:
    return FreeUnit(Plain("a", "a", stored), weight, Learned(v, ()), 0.1)


def test_a_parameter_moves_in_fifteenths_of_its_range_and_not_beyond() -> None:
    weight = torch.tensor([0.5, 1.0, 1.5])
    v = torch.tensor([2.0, -20.0, 5.0], requires_grad=True)
    made = _unit(weight, v).values(torch.float32)
    torch.testing.assert_close(made, torch.tensor([0.7, 0.0, 1.5]), rtol=0, atol=1e-3)
    made.sum().backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(v.grad, torch.tensor([0.1, 0.0, 0.0]), rtol=0, atol=1e-4)
    still = _unit(weight, torch.zeros(3), torch.bfloat16).stored(torch.zeros(3))
    assert torch.equal(still, weight.bfloat16())


def _words(source: Path, out: Path, *more: str) -> list[str]:
    return [
        "tune", str(source), "--scheme", "W4A16", "--group-size", "32", "--format", "gptq", "--dataset", "random",
        "--nsamples", "4", "--seqlen", "16", "--iters", "6", "--batch-size", "4", "--lr", "0.05", "--parallel", "1",
        "-o", str(out), *more,
    ]  # fmt: skip


def test_the_output_has_what_was_learned(tmp_path: Path) -> None:
    source, out = models.make_model("opt", tmp_path / "source"), tmp_path / "out"
    for words in (
        _words(source, out, "--enable_norm_bias_tuning"),
        ["verify", str(out), "--deep", "--source", str(source)],
    ):
        found = CliRunner().invoke(commands, words, catch_exceptions=False)
        assert found.exit_code == 0, found.output
    tuned = load_tuned(tmp_path / "out.tuned")
    replaced = tuned.replaced
    before = {n: t for p in source.glob("*.safetensors") for n, t in load_file(p).items()}
    after = {n: t for p in out.glob("*.safetensors") for n, t in load_file(p).items()}
    block = [n for n in replaced if ".layers.0." in n]
    assert sum("norm" in n and n.endswith("weight") for n in block) == 2
    biases = {n.removesuffix(".bias") for n in replaced if n.endswith(".bias")}
    assert biases == set(tuned.refs)  # those of matrices that get codes, and no norm's
    moved = [n for n in replaced if not torch.equal(before[n], after[n])]
    assert len(moved) > len(replaced) / 2
    assert all(torch.equal(before[n], after[n]) for n in before if n not in replaced and "norm" in n)


def test_without_the_word_nothing_is_replaced(tmp_path: Path) -> None:
    source = models.make_model("llama", tmp_path / "source")
    found = CliRunner().invoke(commands, _words(source, tmp_path / "out"), catch_exceptions=False)
    assert found.exit_code == 0, found.output
    assert load_tuned(tmp_path / "out.tuned").replaced == {}
    identity = json.loads((tmp_path / "out.tuned" / "tuned.json").read_text())["identity"]
    assert identity["signround"]["enable_norm_bias_tuning"] is False
