"""The demo model: the same bytes everywhere, and a checkpoint in every way."""

import hashlib
import json
from pathlib import Path

import numpy as np
from safetensors import safe_open

from shardq.headers import read_checkpoint
from shardq.sources.demo import open_demo

# Of all files, in name order; changes only when the demo model is changed on purpose.
SHARD_DIGEST = "1e86b84fd9577a9785d77cb3257212fd3bee8056408832492991a9c5e599bb31"


def test_demo_is_the_same_everywhere() -> None:
    digest = hashlib.sha256()
    for file in open_demo().files():
        if file.name.endswith(".safetensors"):
            digest.update(bytes.fromhex(file.sha256 or ""))
    assert digest.hexdigest() == SHARD_DIGEST


def test_demo_is_a_sharded_mixture_of_experts() -> None:
    checkpoint = read_checkpoint(open_demo())
    names = set(checkpoint.tensors)
    assert len(checkpoint.shards) == 3
    assert not checkpoint.warnings
    assert checkpoint.config is not None
    assert checkpoint.config["model_type"] == "qwen2_moe"
    assert {
        "lm_head.weight",
        "model.layers.0.mlp.gate_proj.weight",
        "model.layers.1.mlp.gate.weight",
        "model.layers.2.mlp.experts.3.down_proj.weight",
        "model.layers.2.mlp.shared_expert.up_proj.weight",
        "model.layers.2.mlp.shared_expert_gate.weight",
    } <= names
    assert "model.layers.0.mlp.gate.weight" not in names
    assert {t.dtype for t in checkpoint.tensors.values()} == {"BF16", "F32"}
    matrices = [t for t in checkpoint.tensors.values() if t.shape is not None and len(t.shape) == 2]
    assert all(t.shape is not None and t.shape[1] % 128 == 0 for t in matrices)
    assert "license: apache-2.0" in open_demo().contents["README.md"].decode()


def test_demo_values_are_small_and_finite(tmp_path: Path) -> None:
    demo = open_demo()
    moved: list[int] = []
    for file in demo.files():
        assert demo.fetch(file.name, tmp_path / file.name, moved.append) == file.sha256
        assert (tmp_path / file.name).read_bytes() == demo.contents[file.name]
    assert sum(moved) == sum(f.size_bytes for f in demo.files())
    with safe_open(str(tmp_path / "model-00002-of-00003.safetensors"), "pt") as opened:
        router = opened.get_tensor("model.layers.1.mlp.gate.weight").numpy()
        weight = opened.get_tensor("model.layers.1.self_attn.q_proj.weight").float().numpy()
        norm = opened.get_tensor("model.layers.1.input_layernorm.weight").float().numpy()
    for values, center in ((router, 0.0), (weight, 0.0), (norm, 1.0)):
        assert np.isfinite(values).all()
        assert abs(float(values.mean()) - center) < 0.005
        assert 0.015 < float(values.std()) < 0.025


def test_demo_tokenizer_covers_every_byte() -> None:
    tokenizer = json.loads(open_demo().contents["tokenizer.json"])
    vocabulary = tokenizer["model"]["vocab"]
    assert sorted(vocabulary.values()) == list(range(256))
    assert vocabulary["A"] == 65
    assert vocabulary["Ġ"] == 32  # the printable stand-in for a space
    assert tokenizer["added_tokens"][0]["id"] == 256
