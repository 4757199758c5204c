"""Models that are made block by block compute what transformers computes with the whole of them, to the bit."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from shardq.api import quantize
from shardq.errors import BadOption, CheckpointIncomplete, SourceUnreadable, UnsupportedSource
from shardq.limits import Limits
from shardq.recipe import dequantize_recipe, make_recipe
from shardq.sources import open_source

pytest.importorskip("transformers", reason="transformers builds the models: pip install shardq[tune]")

import encoded_sources as sources
import tuned_models as models

from shardq.tune.activations import Batch, Call, Own, join_calls
from shardq.tune.blocks import BlockModel

pytestmark = pytest.mark.usefixtures("one_thread")

COMPUTED = [name for name in models.MODELS if name != "gemma3n"]
DENSE = sorted(
    {min(case.kinds): case.id for case in sources.CASES.values() if case.config["model_type"] == "llama"}.values()
)


@pytest.mark.parametrize("name", COMPUTED)
def test_logits_are_those_of_the_whole_model(name: str, tmp_path: Path) -> None:
    folder = models.make_model(name, tmp_path / "model")
    ids = models.some_ids()
    assert torch.equal(models.block_logits(folder, ids), models.whole_logits(folder, ids))


def test_logits_are_those_of_the_whole_model_in_bfloat16(tmp_path: Path) -> None:
    folder = models.make_model("deepseek_v3", tmp_path / "model")
    ids = models.some_ids()
    found = models.block_logits(folder, ids, torch.bfloat16)
    assert torch.equal(found, models.whole_logits(folder, ids, torch.bfloat16))


def as_mistral(folder: Path) -> Path:
    """The architecture of a fixture whose heads transformers' Llama refuses."""
    config = json.loads((folder / "config.json").read_text())
    changed = {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": None}
    (folder / "config.json").write_text(json.dumps({**config, **changed}))
    return folder


@pytest.mark.parametrize("kind", DENSE)
def test_encoded_weights_are_those_of_the_twin(kind: str, tmp_path: Path) -> None:
    case = sources.CASES[kind]
    source = sources.write_source(case, tmp_path / "source")
    twin = as_mistral(sources.write_twin(case, source, tmp_path / "twin"))
    ids = models.some_ids()
    assert torch.equal(models.block_logits(as_mistral(source), ids), models.whole_logits(twin, ids))


@pytest.mark.parametrize("kind", ["gpt_oss", "qwen3_moe"])
def test_encoded_experts_are_those_that_dequantize_writes(kind: str, tmp_path: Path) -> None:
    source = sources.write_source(sources.CASES[kind], tmp_path / "source")
    quantize(source, dequantize_recipe("F32"), output_dir=tmp_path / "plain", limits=Limits(parallel=1))
    ids = models.some_ids()
    assert torch.equal(models.block_logits(source, ids), models.whole_logits(tmp_path / "plain", ids))


def test_a_layer_that_lies_in_20_shards(tmp_path: Path) -> None:
    folder = models.make_model("qwen3_moe", tmp_path / "model")
    scattered = models.scatter(folder, tmp_path / "scattered", 20)
    layer = [s for n, s in json.loads((scattered / "model.safetensors.index.json").read_text())["weight_map"].items()
             if ".layers.1." in n]  # fmt: skip
    assert len(set(layer)) == 20
    ids = models.some_ids()
    assert torch.equal(models.block_logits(scattered, ids), models.whole_logits(folder, ids))


def test_both_names_of_a_tied_head_are_taken_as_they_are(tmp_path: Path) -> None:
    folder = models.make_model("tied", tmp_path / "model")
    path = folder / "model.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"] * 2}, path, metadata={"format": "pt"})
    ids = models.some_ids()
    assert torch.equal(models.block_logits(folder, ids), models.whole_logits(folder, ids))


def test_a_block_has_content_while_it_is_used_alone(tmp_path: Path) -> None:
    folder = models.make_model("gemma3", tmp_path / "model")
    with BlockModel.open(open_source(str(folder))) as model:
        assert model.block_names == tuple(f"model.layers.{i}" for i in range(3))
        assert model.dtype is torch.bfloat16
        with model.block(1) as module:
            assert all(p.device.type == "cpu" for p in module.parameters())
            assert all(p.is_meta for p in model.skeleton.block(1).parameters())
        assert all(p.is_meta for p in module.parameters())
        assert model.embed(models.some_ids()).hidden.shape == (2, 24, 64)
        assert all(p.is_meta for n, p in model.skeleton.model.named_parameters() if "norm" not in n)
        assert not any(b.is_meta for _, b in model.skeleton.model.named_buffers())


def test_samples_may_run_one_by_one(tmp_path: Path) -> None:
    folder = models.make_model("gpt_oss", tmp_path / "model")
    ids = models.some_ids(3)
    with BlockModel.open(open_source(str(folder)), dtype=torch.float32, attention="eager") as model:
        batch = model.embed(ids)
        for index in range(len(model.block_names)):
            with model.block(index) as module:
                model.advance(module, batch, index)
        found = torch.cat([model.logits(part.hidden) for part in batch.split(1)])
    assert torch.equal(found, torch.cat([models.whole_logits(folder, one[None]) for one in ids]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "tied"])
def test_few_ids_need_few_rows_of_the_embedding(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    folder = models.make_model(name, tmp_path / "model")
    ids = torch.tensor([[3, 4, 80, 3, 41]])
    with BlockModel.open(open_source(str(folder)), dtype=dtype, attention="eager") as model:
        table = model._table(4)
        assert table is not None
        rows = model._reader.fetch_rows(table, [3, 4, 41, 80], dtype)
        assert rows.any(1).nonzero()[:, 0].tolist() == [3, 4, 41, 80]
        assert model._table(24) is None
    assert torch.equal(models.block_logits(folder, ids, dtype), models.whole_logits(folder, ids, dtype))


def test_calls_keep_once_what_all_samples_share() -> None:
    shared, first, second = torch.zeros(1, 2), torch.ones(1, 2), torch.full((1, 2), 2.0)
    calls = [Call((first,), {"table": (shared, first), "cache": None})]
    more = [Call((first.clone(),), {"table": (shared.clone(), second), "cache": None})]
    (joined,) = join_calls(join_calls(calls, more, 1), calls, 2)
    assert joined.args[0] is first
    assert joined.kwargs["table"][0] is shared
    assert joined.kwargs["cache"] is None
    part = Batch(torch.zeros(3, 2, 1), (joined,)).part(1, 3).calls[0].kwargs["table"][1]
    assert isinstance(part, Own)
    assert [v.tolist() for v in part.values] == [second.tolist(), first.tolist()]


def change(folder: Path, name: str, new_name: str | None) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    value = tensors.pop(name) if new_name is None else tensors[name].clone()
    save_file({**tensors, **({new_name: value} if new_name else {})}, path, metadata={"format": "pt"})


def test_what_a_checkpoint_lacks_or_has_too_much_is_told(tmp_path: Path) -> None:
    folder = models.make_model("llama", tmp_path / "model")
    change(folder, "model.layers.1.mlp.up_proj.weight", "model.layers.1.mlp.side_proj.weight")
    with pytest.raises(
        UnsupportedSource, match=r"has model\.layers\.1\.mlp\.side_proj\.weight, which LlamaForCausalLM"
    ):
        BlockModel.open(open_source(str(folder)))
    change(folder, "model.layers.1.mlp.side_proj.weight", None)
    change(folder, "model.layers.1.mlp.up_proj.weight", None)
    with pytest.raises(CheckpointIncomplete, match=r"no tensor for model\.layers\.1\.mlp\.up_proj\.weight"):
        BlockModel.open(open_source(str(folder)))


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_biases_that_a_model_lacks_must_be_zero(value: float, tmp_path: Path) -> None:
    folder = models.make_model("llama", tmp_path / "model")
    path, name = folder / "model.safetensors", "model.layers.1.mlp.up_proj.bias"
    bias = torch.full((96,), value, dtype=torch.float16)
    save_file({**load_file(path), name: bias}, path, metadata={"format": "pt"})
    with BlockModel.open(open_source(str(folder))) as model:
        block = model.block(1)
        if value:
            with pytest.raises(UnsupportedSource, match=r"up_proj\.bias, .* not zero"):
                block.__enter__()
        else:
            with block as module:
                assert module.get_submodule("mlp.up_proj").bias is None


def test_a_checkpoint_of_other_shapes_is_told(tmp_path: Path) -> None:
    folder = models.make_model("llama", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 128}))
    with BlockModel.open(open_source(str(folder))) as model:
        block = model.block(0)
        with pytest.raises(UnsupportedSource, match=r"has \[128, 64\]"):
            block.__enter__()


def test_tensors_of_no_block_are_noted(tmp_path: Path) -> None:
    folder = models.make_model("llama", tmp_path / "model")
    change(folder, "model.layers.1.mlp.up_proj.weight", "model.layers.3.mlp.up_proj.weight")
    with BlockModel.open(open_source(str(folder))) as model:
        (note,) = model.matched.notes
    assert "model.layers.3.mlp.up_proj.weight" in note


@pytest.mark.parametrize("rename", [None, "model-Q4_0.gguf"])
def test_what_is_no_checkpoint_of_transformers_is_refused(rename: str | None, tmp_path: Path) -> None:
    folder = models.make_model("llama", tmp_path / "model")
    if rename:
        (folder / "model.safetensors").rename(folder / rename)
        with pytest.raises(UnsupportedSource, match="GGUF"):
            BlockModel.open(open_source(str(folder)))
        return
    (folder / "config.json").unlink()
    with pytest.raises(SourceUnreadable, match=r"no config\.json"):
        BlockModel.open(open_source(str(folder)))


@pytest.mark.parametrize(
    ("config", "error", "match"),
    [
        ({"model_type": "nobody"}, UnsupportedSource, "nobody"),
        ({"model_type": "t5"}, UnsupportedSource, "an encoder and a decoder"),
        ({"model_type": "own", "auto_map": {"AutoConfig": "code.Own"}}, BadOption, "--trust-remote-code"),
    ],
)
def test_models_that_are_not_known_are_refused(
    config: dict[str, Any], error: type[Exception], match: str, tmp_path: Path
) -> None:
    folder = models.make_model("llama", tmp_path / "model")
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(error, match=match):
        BlockModel.open(open_source(str(folder)))


CODE = """
from transformers import LlamaConfig, LlamaForCausalLM
class OwnConfig(LlamaConfig):
    model_type = "own_shardq_test"
class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
    def forward(self, *args, **kwargs):
        found = super().forward(*args, **kwargs)
        found.logits = found.logits * 2
        return found
"""


def test_code_of_a_checkpoint_runs_only_when_it_is_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("sys.path", [*sys.path])
    folder = models.make_model("llama", tmp_path / "model")
    ids = models.some_ids()
    expected = models.whole_logits(folder, ids) * 2
    config = json.loads((folder / "config.json").read_text())
    autos = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    config |= {"model_type": "own_shardq_test", "architectures": ["OwnForCausalLM"], "auto_map": autos}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(CODE)
    source = open_source(str(folder))
    with pytest.raises(BadOption, match="--trust-remote-code"):
        BlockModel.open(source)
    with BlockModel.open(source, dtype=torch.float32, trust_remote_code=True, attention="eager") as model:
        batch = model.embed(ids)
        for index in range(len(model.block_names)):
            with model.block(index) as module:
                batch = batch.moved(model.run(module, batch, index))
        assert torch.equal(model.logits(batch.hidden), expected)


def test_models_whose_blocks_are_not_one_after_the_other_are_refused(tmp_path: Path) -> None:
    folder = models.make_model("gemma3n", tmp_path / "model")
    with (
        BlockModel.open(open_source(str(folder))) as model,
        pytest.raises(UnsupportedSource, match=r"\[2, 1, 24, 64\]"),
    ):
        model.embed(models.some_ids())


def test_experts_that_a_checkpoint_has_one_by_one_become_stacks(tmp_path: Path) -> None:
    """gpt-oss: alternating gate and up, [inputs, outputs], with biases."""
    case = sources.CASES["gpt_oss_bf16"]
    stacks = sources.write_source(case, tmp_path / "stacks")
    single = sources.write_twin(case, stacks, tmp_path / "single", None)
    assert any(".experts.2.gate_proj.bias" in n for n in sources.read_tensors(single))
    ids = models.some_ids()
    expected = models.whole_logits(stacks, ids)
    assert torch.equal(models.block_logits(single, ids), expected)
    for layout in ("gptq", "compressed-tensors"):  # in halves, and in turns
        recipe = make_recipe(f"W8A16@{layout}", group_size=32)
        quantize(stacks, recipe, output_dir=tmp_path / layout, limits=Limits(parallel=1))
        difference = torch.linalg.norm(models.block_logits(tmp_path / layout, ids) - expected)
        assert difference < 0.1 * torch.linalg.norm(expected), layout
