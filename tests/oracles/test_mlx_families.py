"""The table of mlx_families against mlx-lm: one tiny checkpoint for each way of naming experts, made of mlx-lm's own
model, with the names that its `sanitize` expects."""

import json
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Final

import pytest

import shardq
from shardq import Limits, make_recipe
from shardq.layouts.mlx_families import FAMILIES, Stacking, module_paths

pytestmark = pytest.mark.oracle
mx: Any = pytest.importorskip("mlx.core", reason="mlx is not installed; `nox -s oracles` installs it")
utils: Any = pytest.importorskip("mlx_lm.utils", reason="mlx-lm is not installed; `nox -s oracles` installs it")

COMMON: Final = {
    "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 96, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
    "max_position_embeddings": 128, "tie_word_embeddings": False, "num_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 32, "norm_topk_prob": True, "attention_bias": False,
}  # fmt: skip
ROUTED: Final = {
    "n_routed_experts": 4, "n_shared_experts": 1, "routed_scaling_factor": 1.0, "first_k_dense_replace": 1,
    "n_group": 1, "topk_group": 1, "topk_method": "noaux_tc", "scoring_func": "sigmoid",
}  # fmt: skip
LATENT: Final = {
    "kv_lora_rank": 32, "q_lora_rank": 32, "qk_rope_head_dim": 32, "qk_nope_head_dim": 32, "v_head_dim": 32,
}  # fmt: skip
LAYERS: Final = {"layer_types": ["full_attention"] * 2, "sliding_window": 16}
CONFIGS: Final[Mapping[str, Mapping[str, Any]]] = {
    "qwen3_moe": {"decoder_sparse_step": 1, "mlp_only_layers": [0]},
    "qwen2_moe": {"shared_expert_intermediate_size": 64},
    "olmoe": {},
    "mellum": {**LAYERS, "rope_parameters": {"full_attention": {"rope_theta": 10000.0, "rope_type": "default"}}},
    "hunyuan": {
        "moe_topk": 2, "num_shared_expert": 1, "use_mixed_mlp_moe": True, "use_qk_norm": True, "use_cla": False,
        "cla_share_factor": 2, "rope_scaling": {"alpha": 1000.0, "factor": 1.0, "type": "dynamic"},
    },
    "glm4_moe": {**ROUTED, "rope_scaling": None, "use_qk_norm": True, "partial_rotary_factor": 0.5},
    "ernie4_5_moe": {"use_bias": False, "moe_num_experts": 4, "moe_k": 2, "moe_layer_start_index": 1},
    "exaone_moe": {**LAYERS, "is_moe_layer": [False, True], "num_shared_experts": 1},
    "deepseek_v2": {**ROUTED, **LATENT, "topk_method": "greedy", "scoring_func": "softmax", "moe_layer_freq": 1,
                    "rope_scaling": {"type": "yarn", "factor": 1.0, "original_max_position_embeddings": 128}},
    "deepseek_v3": {**ROUTED, **LATENT},
    "dots1": {**ROUTED, "scoring_func": "noaux_tc"},
    "Klear": {"decoder_sparse_step": 1, "mlp_only_layers": [], "n_shared_experts": 1},
    "afmoe": {**LAYERS, "num_dense_layers": 1},
    "mixtral": {"num_local_experts": 4},
    "phimoe": {"num_local_experts": 4, "rope_scaling": {"long_factor": [1.0], "short_factor": [1.0],
               "long_mscale": 1.0, "short_mscale": 1.0}},
    "minimax": {"num_local_experts": 4, "shared_intermediate_size": 64, "rotary_dim": 16},
    "jamba": {
        "attn_layer_offset": 1, "attn_layer_period": 2, "expert_layer_offset": 1, "expert_layer_period": 2,
        "mamba_d_conv": 4, "mamba_d_state": 16, "mamba_expand": 2, "mamba_dt_rank": 32,
    },
    "lfm2_moe": {
        "use_expert_bias": True, "num_dense_layers": 1, "norm_eps": 1e-6, "conv_bias": False, "conv_L_cache": 3,
        "full_attn_idxs": [0],
    },
    "bailing_moe": {"num_shared_experts": 1, "first_k_dense_replace": 1},
    "laguna": {**LAYERS, "shared_expert_intermediate_size": 64, "gating": True},
    "nemotron_h": {
        **ROUTED, "mamba_num_heads": 4, "mamba_head_dim": 32, "mamba_proj_bias": False, "ssm_state_size": 16,
        "conv_kernel": 4, "n_groups": 2, "mlp_bias": False, "layer_norm_epsilon": 1e-6, "use_bias": False,
        "use_conv_bias": True, "hybrid_override_pattern": ["*", "E"], "moe_shared_expert_intermediate_size": 64,
    },
}  # fmt: skip


def to_source(name: str, array: Any, stacking: Stacking) -> dict[str, Any]:
    """Tensors of a checkpoint that become this one of the model."""
    module = name.removesuffix(".weight")
    for old, new in stacking.projections:
        layer = module.removesuffix(f"{stacking.stack}.{new}")
        if layer != module:
            return {f"{layer}{stacking.source}.{e}.{old}.weight": part for e, part in enumerate(array)}
    return {name: array}


def write_source(folder: Path, model_type: str, stacking: Stacking) -> None:
    config = {**COMMON, "model_type": model_type, **CONFIGS[model_type]}
    model_class, args_class = utils._get_classes(config)
    model = model_class(args_class.from_dict(config))
    tensors: dict[str, Any] = {}
    for name, array in import_module("mlx.utils").tree_flatten(model.parameters()):
        tensors |= to_source(name, array.astype(mx.bfloat16), stacking)
    folder.mkdir()
    mx.save_safetensors(str(folder / "model.safetensors"), tensors, metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("model_type", CONFIGS)
def test_experts_are_stacked_as_the_model_has_them(model_type: str, tmp_path: Path) -> None:
    mx.set_default_device(mx.cpu)
    family = next(f for f in FAMILIES if model_type in f.model_types)
    assert family.stacking is not None
    write_source(tmp_path / "source", model_type, family.stacking)
    utils.load_model(tmp_path / "source", strict=True)  # the names are those that it expects
    names = list(mx.load(str(tmp_path / "source" / "model.safetensors")))
    kept = [f"re:.*{k.pattern.lstrip('^')}" for k in family.kept]
    kept = [k for k, old in zip(kept, family.kept, strict=True) if any(_hit(old.pattern, n) for n in names)]
    recipe = make_recipe("W4A16G32@mlx", ignore=kept, ragged="keep")
    shardq.quantize(tmp_path / "source", recipe, output_dir=tmp_path / "out", limits=Limits(parallel=1))
    model, _ = utils.load_model(tmp_path / "out", strict=True)
    stacked = {n for n, m in model.named_modules() if type(m).__name__ == "QuantizedSwitchLinear"}
    assert (
        stacked == {p for n in names if ".experts.0." in n for p in module_paths(n.removesuffix(".weight"))} & stacked
    )
    assert len(stacked) == len([n for n in names if ".experts.0." in n])


def _hit(pattern: str, name: str) -> bool:
    return import_module("re").search(pattern, name.removesuffix(".weight")) is not None
