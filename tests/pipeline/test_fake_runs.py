"""Whole runs in the layout `fake`: what the ledger says is of the values that are written."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import shardq
from shardq import Limits
from shardq.errors import LayoutRefuses
from shardq.ledger import LEDGER, decode_ledger


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for path in folder.glob("*.safetensors") for k, v in load_file(path).items()}


@pytest.mark.parametrize("scheme", ["W4A16", "MXFP4", "FP8_BLOCK"])
def test_the_ledger_tells_the_error_of_what_is_written(checkpoint: Path, tmp_path: Path, scheme: str) -> None:
    out = tmp_path / "out"
    shardq.quantize(checkpoint, f"{scheme}@fake", output_dir=out, limits=Limits(parallel=1))
    assert shardq.verify(out, deep=True, source=checkpoint).problems == ()
    config = json.loads((out / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["shardq_fake"]["scheme"] == scheme.replace("_", "-")
    before, after = weights(checkpoint), weights(out)
    assert {(k, v.dtype, v.shape) for k, v in before.items()} == {(k, v.dtype, v.shape) for k, v in after.items()}
    for name, entry in decode_ledger((out / LEDGER).read_bytes())["tensors"].items():
        error = (before[name].float() - after[name].float()).abs().max().item()
        assert error == (entry["max_error"] if entry["outcome"] == "quantized" else 0), name
        assert torch.isfinite(after[name].float()).all()


def test_a_last_group_may_be_short(checkpoint: Path, tmp_path: Path) -> None:
    """For research: loaders have no such groups, kernels do."""
    out = tmp_path / "out"
    shardq.quantize(checkpoint, shardq.make_recipe("W4A16@fake", group_size=96), output_dir=out)
    assert shardq.verify(out, deep=True, source=checkpoint).problems == ()
    assert shardq.audit(out, source=checkpoint).problems == ()


def test_what_a_configuration_cannot_say_is_refused_before_a_weight_is_read(checkpoint: Path, tmp_path: Path) -> None:
    """Readers of awq look for the name of a kept module anywhere in a name."""
    rule = {"model.layers.1.mlp.up_proj": {"bits": 16}}
    recipe = shardq.make_recipe("W4A16@awq", layer_config=rule, split_fused=True)
    shardq.plan(checkpoint, recipe)
    renamed = tmp_path / "renamed"
    renamed.mkdir()
    for path in checkpoint.iterdir():
        (renamed / path.name).write_bytes(
            path.read_bytes().replace(b"layers.1.mlp.gate_proj", b"layers.1.mlp.up_proj_2")
        )
    with pytest.raises(LayoutRefuses, match=r"cannot keep model\.layers\.1\.mlp\.up_proj beside .*up_proj_2"):
        shardq.plan(renamed, recipe)
