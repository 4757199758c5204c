"""Runs that leave prediction layers out, keep them, or quantize them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import shardq
from shardq import Limits
from shardq.errors import BadOption
from shardq.outputs import open_result, read_output

ONE = Limits(parallel=1)


@pytest.fixture
def source(make_checkpoint: Callable[..., Path]) -> Path:
    """Four layers, of which the config counts two: shard 3 holds nothing else, shard 4 also the head."""
    folder = make_checkpoint(layers=4)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 2}))
    return folder


def run(source: Path, out: Path, **words: Any) -> shardq.Result:
    recipe = shardq.make_recipe("W4A16", layout="compressed-tensors", group_size=32, **words)
    return shardq.quantize(source, recipe, output_dir=out, limits=ONE)


def ledger(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = read_output(open_result(str(out)), str(out)).ledger["tensors"]
    return found


def test_dropped_tensors_are_in_no_file_and_in_the_ledger(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run(source, out, mtp="drop")
    assert (result.quantized, result.copied, result.dropped) == (14, 5, 16)
    files = sorted(f.name for f in out.glob("*.safetensors"))
    assert files == [f"model-0000{k}-of-00004.safetensors" for k in (1, 2, 4)]
    entries = ledger(out)
    dropped = {n: e for n, e in entries.items() if e["outcome"] == "dropped"}
    assert set(dropped) == {n for n in entries if n.startswith(("model.layers.2.", "model.layers.3."))}
    assert {(e["rule"], e["file"], tuple(e["outputs"])) for e in dropped.values()} == {("mtp:drop", None, ())}
    index = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    assert not [n for n in index if n.startswith(("model.layers.2.", "model.layers.3."))]
    block = json.loads((out / "config.json").read_text())["quantization_config"]
    assert not [n for n in block["ignore"] if "layers.2" in n or "layers.3" in n]
    verified = shardq.verify(out, deep=True, source=source)
    assert verified.problems == ()
    assert shardq.audit(out, source=source).problems == ()
    assert "--mtp drop" in (out / "README.md").read_text()
    again = run(source, out, mtp="drop")
    assert (again.already_done, again.dropped) == (True, 16)


def test_kept_prediction_layers_are_listed_and_quantized_ones_are_not(source: Path, tmp_path: Path) -> None:
    kept, quantized = tmp_path / "kept", tmp_path / "quantized"
    assert run(source, kept).quantized == 14
    assert run(source, quantized, mtp="quantize").quantized == 28
    listed = json.loads((kept / "config.json").read_text())["quantization_config"]["ignore"]
    assert "model.layers.2.mlp.down_proj" in listed
    listed = json.loads((quantized / "config.json").read_text())["quantization_config"]["ignore"]
    assert "model.layers.2.mlp.down_proj" not in listed
    assert ledger(quantized)["model.layers.3.mlp.up_proj.weight"]["rule"] == "mtp_index"
    assert shardq.verify(quantized, deep=True, source=source).problems == ()


def test_outputs_of_one_read_drop_alike(source: Path, tmp_path: Path) -> None:
    recipes = [shardq.make_recipe("W4A16@gptq", group_size=32, mtp="drop"), shardq.make_recipe("W8A16@gptq")]
    with pytest.raises(BadOption, match="--mtp drop for some outputs only"):
        shardq.quantize_many(source, recipes, output_dir=tmp_path / "many", limits=ONE)
