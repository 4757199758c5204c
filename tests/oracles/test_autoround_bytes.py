"""Every tensor that auto-round 0.16.1 writes in model-free mode, byte for byte, on small checkpoints of all dtypes."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import pytest
import torch

from shardq import Limits, Recipe, make_recipe, quantize

RunAutoRound = Callable[..., Path]
Compare = Callable[[Path, Path], tuple[int, list[str]]]
MakeWeight = Callable[[int, int, int, torch.dtype], torch.Tensor]
WriteCheckpoint = Callable[[Path, Mapping[str, Any], Mapping[str, torch.Tensor]], Path]

DTYPES: Final = (torch.bfloat16, torch.float16, torch.float32)  # one for each layer
HIDDEN, WIDE, VOCAB, HEADS, KV_HEADS, HEAD_DIM = 256, 512, 512, 4, 2, 64
MODULES: Final = {
    "self_attn.q_proj": (HEADS * HEAD_DIM, HIDDEN),
    "self_attn.k_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
    "self_attn.v_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HEADS * HEAD_DIM),
}
MLP: Final = {"gate_proj": (WIDE, HIDDEN), "up_proj": (WIDE, HIDDEN), "down_proj": (HIDDEN, WIDE)}
LAYERS: Final = {
    "model.layers.0.mlp.down_proj": {"bits": 8, "group_size": 64},
    "[qkv]_proj": {"bits": 2, "group_size": 32},
    "layers.1.self_attn.o_proj": {"bits": 16},
    ".*layers.2.mlp.(gate|up)_proj": {"bits": 8},  # its dots mean dots: auto-round escapes them
}

CASES: Final[dict[str, tuple[tuple[str, ...], Recipe]]] = {
    "W2A16": (("--scheme", "W2A16"), make_recipe("W2A16")),
    "W2A16G32": (("--scheme", "W2A16G32"), make_recipe("W2A16G32")),
    "W2A16G64": (("--scheme", "W2A16G64"), make_recipe("W2A16G64")),
    "W4A16": (("--scheme", "W4A16"), make_recipe("W4A16")),
    "W4A16-group-256": (("--scheme", "W4A16", "--group_size", "256"), make_recipe("W4A16", group_size=256)),
    "W8A16": (("--scheme", "W8A16"), make_recipe("W8A16")),
    "W2A16-asym": (("--scheme", "W2A16", "--asym"), make_recipe("W2A16", symmetric=False)),
    "W4A16-asym": (("--scheme", "W4A16", "--asym"), make_recipe("W4A16", symmetric=False)),
    "W8A16-asym": (("--scheme", "W8A16", "--asym"), make_recipe("W8A16", symmetric=False)),
    "layer-config": (
        ("--scheme", "W4A16", "--layer_config", json.dumps(LAYERS), "--ignore_layers", "layers.0.self_attn.o_proj"),
        make_recipe("W4A16", layer_config=LAYERS, ignore=["layers.0.self_attn.o_proj"], ignore_dialect="auto-round"),
    ),
}


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory, make_weight: MakeWeight, write_checkpoint: WriteCheckpoint) -> Path:
    """A folder with two Qwen3-shaped checkpoints, `tied` and `untied`."""
    folder = tmp_path_factory.mktemp("qwen3")
    for name, tied in (("tied", True), ("untied", False)):
        config = qwen3_config("qwen3", "Qwen3ForCausalLM", len(DTYPES), tied)
        write_checkpoint(folder / name, config, qwen3_tensors(make_weight, len(DTYPES), tied))
    return folder


def qwen3_config(model_type: str, architecture: str, layers: int, tied: bool) -> dict[str, Any]:
    return {
        "architectures": [architecture], "model_type": model_type, "hidden_size": HIDDEN, "intermediate_size": WIDE,
        "num_hidden_layers": layers, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM, "vocab_size": VOCAB, "tie_word_embeddings": tied, "torch_dtype": "bfloat16",
        "hidden_act": "silu", "rms_norm_eps": 1e-6, "max_position_embeddings": 512, "rope_theta": 10000.0,
    }  # fmt: skip


def qwen3_tensors(make_weight: MakeWeight, layers: int, tied: bool, experts: int = 0) -> dict[str, torch.Tensor]:
    """Tensors by name; layer i has dtype DTYPES[i]. With `experts`, the MLPs are routed."""
    shapes = {"model.embed_tokens": (VOCAB, HIDDEN)}
    for i in range(layers):
        mlp = {f"mlp.{m}": s for m, s in MLP.items()}
        if experts:
            parts = ("shared_expert", *(f"experts.{e}" for e in range(experts)))
            mlp = {f"mlp.{part}.{m}": s for part in parts for m, s in MLP.items()}
            mlp["mlp.gate"] = (experts, HIDDEN)
        shapes |= {f"model.layers.{i}.{m}": s for m, s in {**MODULES, **mlp}.items()}
    if not tied:
        shapes["lm_head"] = (VOCAB, HIDDEN)
    tensors = {
        f"{module}.weight": make_weight(max(rows, 8), columns, seed, DTYPES[int(layer_of(module))])[:rows].contiguous()
        for seed, (module, (rows, columns)) in enumerate(shapes.items())
    }
    for i in range(layers):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{i}.{norm}.weight"] = torch.linspace(0.5, 1.5, HIDDEN, dtype=torch.bfloat16)
        for norm in ("self_attn.q_norm", "self_attn.k_norm"):
            tensors[f"model.layers.{i}.{norm}.weight"] = torch.linspace(0.5, 1.5, HEAD_DIM, dtype=torch.bfloat16)
    return tensors | {"model.norm.weight": torch.linspace(0.5, 1.5, HIDDEN, dtype=torch.bfloat16)}


def layer_of(module: str) -> str:
    """The layer's number; 0 outside the layers."""
    return next((part for part in module.split(".") if part.isdigit()), "0")


def check_configs_agree(ours: Path, theirs: Path) -> None:
    """What both say of the model as a whole; extra_config may list kept modules in more than one way."""
    a, b = (json.loads((folder / "config.json").read_text())["quantization_config"] for folder in (ours, theirs))
    b.pop("extra_config", None)
    assert {k: a.get(k) for k in b} == b


@pytest.mark.oracle
@pytest.mark.parametrize("case", CASES)
def test_all_tensors_equal_auto_round(
    case: str, tmp_path: Path, run_auto_round: RunAutoRound, qwen3: Path, compare: Compare
) -> None:
    words, recipe = CASES[case]
    source = qwen3 / ("tied" if list(CASES).index(case) % 2 else "untied")
    theirs = run_auto_round(source, tmp_path / "theirs", *words)
    quantize(source, recipe, output_dir=tmp_path / "ours", limits=Limits(parallel=1))
    count, differences = compare(tmp_path / "ours", theirs)
    assert count >= len(DTYPES) * (7 - 2) * 3  # most modules became three tensors each
    assert differences == []
    check_configs_agree(tmp_path / "ours", theirs)


@pytest.mark.oracle
def test_quantized_head_equals_auto_round(
    tmp_path: Path, run_auto_round: RunAutoRound, qwen3: Path, compare: Compare
) -> None:
    theirs = run_auto_round(qwen3 / "untied", tmp_path / "theirs", "--scheme", "W4A16", "--quant_lm_head")
    recipe = make_recipe("W4A16", quant_lm_head=True)
    quantize(qwen3 / "untied", recipe, output_dir=tmp_path / "ours", limits=Limits(parallel=1))
    count, differences = compare(tmp_path / "ours", theirs)
    assert count > len(DTYPES) * 7 * 3
    assert differences == []


# W4A16_MIXED as auto-round's model-free code means it; through its command line and its API, 0.16.1 loses the default
# of 8 bits on the way and writes 4 bits everywhere.
MIXED: Final = {".shared_expert.": {"bits": 8}, ".experts.": {"bits": 4}, ".moe.": {"bits": 4}}


@pytest.mark.oracle
def test_mixed_experts_equal_auto_round(
    tmp_path: Path, make_weight: MakeWeight, write_checkpoint: WriteCheckpoint, run_auto_round: RunAutoRound,
    compare: Compare,
) -> None:  # fmt: skip
    config = qwen3_config("qwen3_moe", "Qwen3MoeForCausalLM", 2, tied=True)
    config |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": WIDE, "decoder_sparse_step": 1}
    source = write_checkpoint(tmp_path / "source", config, qwen3_tensors(make_weight, 2, tied=True, experts=4))
    theirs = run_auto_round(source, tmp_path / "theirs", "--scheme", "W8A16", "--layer_config", json.dumps(MIXED))
    quantize(source, "W4A16_MIXED", output_dir=tmp_path / "ours", limits=Limits(parallel=1))
    count, differences = compare(tmp_path / "ours", theirs)
    assert count > 2 * (4 + 5 * 3) * 3
    assert differences == []
