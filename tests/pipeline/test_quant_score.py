"""Anyone's quantized checkpoint beside its source: the figures that a run measured while it quantized, found again by a
reader of the result alone."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import shardq
from shardq import Limits
from shardq.cli.group import commands
from shardq.errors import BadOption, UnsupportedSource
from shardq.ledger import LEDGER, decode_ledger
from shardq.outputs import PROVENANCE
from shardq.quant_score import score_result
from shardq.sources import open_source

ONE = Limits(parallel=1)
OURS = (LEDGER, PROVENANCE)
KINDS = [
    ("W4A16", "auto_round", None), ("W4A16", "gptq", None), ("W4A16", "awq", False), ("W8A16", "mlx", None),
    ("NVFP4A16", "mlx", None), ("MXFP4", "compressed-tensors", None), ("FP8_BLOCK", "fp8", None),
    ("FP8_TENSOR", "compressed-tensors", None), ("W8A8", "compressed-tensors", None), ("W4A16", "fake", None),
]  # fmt: skip


def make(out: Path, scheme: str, layout: str, symmetric: bool | None = None) -> dict[str, Any]:
    """An output of the demo without what says that it is ours; returns its ledger."""
    recipe = shardq.make_recipe(scheme, layout=layout, symmetric=symmetric, ragged="keep")
    shardq.quantize("demo", recipe, output_dir=out, limits=ONE)
    ledger: dict[str, Any] = decode_ledger((out / LEDGER).read_bytes())["tensors"]
    for name in OURS:
        (out / name).unlink()
    return ledger


@pytest.mark.parametrize(("scheme", "layout", "symmetric"), KINDS, ids=[f"{s}@{x}" for s, x, _ in KINDS])
def test_figures_are_those_of_the_run(tmp_path: Path, scheme: str, layout: str, symmetric: bool | None) -> None:
    ledger = make(tmp_path / "out", scheme, layout, symmetric)
    found = shardq.score(tmp_path / "out", "demo", full=True)
    assert (found.lacking, found.extra, found.left, found.moved) == ((), (), {}, ())
    assert {t.name for t in found.tensors} == ledger.keys()
    quantized = {t.name: t for t in found.quantized}
    assert quantized.keys() == {name for name, entry in ledger.items() if entry["outcome"] == "quantized"}
    for name, t in quantized.items():
        keys = ("squared_error", "squared_weight", "max_error") if layout != "fake" else ()
        assert [t.errors.describe()[k] for k in keys] == [ledger[name][k] for k in keys]
        assert t.errors.relative == pytest.approx(ledger[name]["relative_error"], rel=1e-3)
        assert t.errors.weights == ledger[name]["shape"][0] * ledger[name]["shape"][1]


def test_what_does_not_belong_together_is_told(tmp_path: Path) -> None:
    make(tmp_path / "out", "W4A16", "gptq")
    path = next((tmp_path / "out").glob("*-00001-*"))
    tensors = load_file(path)
    index = tmp_path / "out" / "model.safetensors.index.json"
    norm = "model.layers.0.input_layernorm.weight"
    tensors[norm] = tensors[norm] * 2
    tensors["model.extra.weight"] = torch.ones(4, dtype=torch.bfloat16)
    for part in ("qweight", "qzeros", "scales", "g_idx"):
        tensors.pop(f"model.layers.0.mlp.up_proj.{part}")
    save_file(tensors, path, metadata={"format": "pt"})
    listed = json.loads(index.read_text())
    old = listed["weight_map"].items()
    listed["weight_map"] = {n: f for n, f in old if f != path.name} | dict.fromkeys(tensors, path.name)
    index.write_text(json.dumps(listed))
    found = shardq.score(tmp_path / "out", "demo")
    assert found.moved == (norm,)
    assert found.extra == ("model.extra.weight",)
    assert found.lacking == ("model.layers.0.mlp.up_proj.weight",)
    done = CliRunner().invoke(commands, ["score", str(tmp_path / "out"), "--source", "demo"])
    assert done.exit_code == 0
    assert "1 vectors differ" in done.stderr
    assert "lacking       model.layers.0.mlp.up_proj.weight" in done.stdout


def test_a_sample_from_a_repo_reads_little(
    tmp_path: Path, make_checkpoint: Callable[..., Path], hub: Any, make_model: Any
) -> None:
    source = make_checkpoint(hidden=512)
    shardq.quantize(source, output_dir=tmp_path / "out", limits=ONE)
    whole = shardq.score(tmp_path / "out", source)
    assert len(whole.quantized) == whole.matrices
    remote = make_model(tmp_path / "out")
    hub.log.clear()
    found = score_result(remote.open(), open_source(str(source)), sample=2)
    assert [t.kind != "" for t in found.tensors].count(True) == len(found.quantized) == 2
    everything = {t.name: t for t in whole.tensors}
    assert all(t == everything[t.name] for t in found.tensors)
    assert found.result_commit == remote.hub.repos["org/model"].refs["main"]
    assert all(seen.range for seen in hub.seen("/store/"))


def test_what_cannot_be_compared_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadOption, match="--sample 0"):
        shardq.score("demo", "demo", sample=0)
    (tmp_path / "gguf").mkdir()
    (tmp_path / "gguf" / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(UnsupportedSource, match="demo is not in GGUF: expected the checkpoint"):
        shardq.score("demo", tmp_path / "gguf")
