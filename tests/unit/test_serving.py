"""What engines are said to do with small checkpoints: one case for each row of table/ that decides something."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from shardq.errors import BadOption, TargetRefuses
from shardq.plans import make_plan
from shardq.recipe import make_recipe
from shardq.serving.facts import load_facts, parse_facts
from shardq.serving.judge import judge, parallel_verdicts
from shardq.serving.report import describe_serving
from shardq.serving.served import Served, read_served, served_of_plan
from shardq.serving.targets import Target, check_targets, may_split, parse_target

Tensors = dict[str, tuple[str, tuple[int, ...]]]
P = "model.layers.0."
CONFIG: dict[str, Any] = {
    "model_type": "qwen3_moe", "num_attention_heads": 8, "num_key_value_heads": 4, "hidden_size": 512,
    "num_experts": 4, "num_hidden_layers": 1, "vocab_size": 1024, "dtype": "bfloat16",
}  # fmt: skip


def source(moe: bool, inner: int = 1024, kv_rows: int = 256) -> Tensors:
    tensors: Tensors = {
        "model.embed_tokens.weight": ("BF16", (1024, 512)),
        "lm_head.weight": ("BF16", (1024, 512)),
        P + "input_layernorm.weight": ("BF16", (512,)),
        P + "self_attn.q_proj.weight": ("BF16", (512, 512)),
        P + "self_attn.k_proj.weight": ("BF16", (kv_rows, 512)),
        P + "self_attn.v_proj.weight": ("BF16", (kv_rows, 512)),
        P + "self_attn.o_proj.weight": ("BF16", (512, 512)),
    }
    parts = [f"mlp.experts.{i}." for i in range(4)] if moe else ["mlp."]
    for part in parts:
        tensors |= {
            P + part + "gate_proj.weight": ("BF16", (inner, 512)),
            P + part + "up_proj.weight": ("BF16", (inner, 512)),
            P + part + "down_proj.weight": ("BF16", (512, inner)),
        }
    if moe:
        tensors[P + "mlp.gate.weight"] = ("BF16", (4, 512))
    return tensors


@pytest.fixture
def serve(make_checkpoint: Any) -> Callable[..., Served]:
    """serve(scheme, moe=, inner=, kv_rows=, config=, **recipe): what the output of a plan is to engines."""

    def made(
        scheme: str, moe: bool = False, inner: int = 1024, kv_rows: int = 256, config: dict[str, Any] | None = None,
        extra: Tensors | None = None, **options: Any,
    ) -> Served:  # fmt: skip
        shards = {"a.safetensors": source(moe, inner, kv_rows) | (extra or {})}
        checkpoint = make_checkpoint(shards, CONFIG | (config or {}))
        return served_of_plan(make_plan(checkpoint, make_recipe(scheme, **options), before_tuning=True))

    return made


def said(served: Served, engine: str, tp: int = 1, device: str = "") -> tuple[str, set[str]]:
    verdict = next(v for v in judge(served, tp, device) if v.engine == engine)
    return verdict.answer, {r.fact for r in verdict.reasons}


OSS: dict[str, Any] = {"moe": True, "config": {"model_type": "gpt_oss"}}
# scheme, options of serve, engine, tp, device, answer, the row that says so ("" for none)
OWN: list[tuple[str, dict[str, Any], str, int, str, str, str]] = [
    ("W4A16@compressed-tensors", {}, "vllm", 1, "", "loads", ""),
    ("W4A16@compressed-tensors", {}, "vllm", 1, "cpu", "loads", ""),
    ("W4A16@compressed-tensors", {"moe": True}, "vllm", 1, "cpu", "limits", "amx_experts"),
    ("W4A16_ASYM@compressed-tensors", {"moe": True}, "vllm", 1, "cpu", "no", "ct_moe_asym_cpu"),
    ("W4A16@compressed-tensors", OSS, "transformers", 1, "", "no", "gpt_oss_experts_llmcompressor"),
    ("W4A16@compressed-tensors", OSS, "sglang", 1, "", "no", "gpt_oss_experts_sglang"),
    ("W4A16@compressed-tensors", OSS, "vllm", 1, "", "no", "gpt_oss_experts"),
    ("FPW8A16", {}, "vllm", 1, "cpu", "no", "ct_fp8_weights_cpu"),
    ("FP8_STATIC", {}, "vllm", 1, "", "loads", ""),
    ("FP8_STATIC", {"moe": True}, "vllm", 1, "", "no", "static_experts_in_rows"),
    ("W8A8_STATIC", {"moe": True}, "vllm", 1, "", "no", "static_experts_in_rows"),
    ("FP8_STATIC_TENSOR", {"moe": True}, "vllm", 1, "", "limits", "ct_fp8_moe_cpu"),
    ("FP8_STATIC_TENSOR", {"moe": True}, "transformers", 1, "", "limits", "static_experts_dropped"),
    ("NVFP4@auto_round", {}, "vllm", 1, "", "no", "auto_round_nvfp4"),
    ("W4A16@compressed-tensors", {"moe": True}, "transformers", 1, "", "loads", ""),
    ("W4A16@compressed-tensors", {}, "llama.cpp", 1, "", "no", "method"),
    ("W4A16@compressed-tensors", {}, "mlx", 1, "", "no", "ct_mlx"),
    ("W8A16@compressed-tensors", {}, "vllm", 1, "", "limits", "ct_int_cpu"),
    ("W8A16@compressed-tensors", {}, "vllm", 1, "cpu", "no", "ct_int_cpu"),
    ("W3A16@compressed-tensors", {}, "vllm", 1, "", "limits", "ct_odd_widths_vllm"),
    ("W3A16@compressed-tensors", {}, "sglang", 1, "", "no", "ct_int_sglang"),
    ("W4A16@compressed-tensors", {"symmetric": False}, "transformers", 1, "", "limits", "ct_asym_transformers"),
    ("W4A16@compressed-tensors", {"symmetric": False}, "vllm", 1, "cpu", "loads", ""),
    ("W4A16@compressed-tensors", {"symmetric": False}, "sglang", 1, "", "limits", "ct_asym_sglang"),
    ("W4A16@compressed-tensors", {"symmetric": False, "moe": True}, "transformers", 1, "", "no", "ct_moe_asym"),
    ("W4A16@compressed-tensors", {"layer_config": {"**.o_proj": {"bits": 8}}}, "transformers", 1, "", "limits",
     "ct_mixed"),
    ("W4A16@compressed-tensors", {"layer_config": {"**.o_proj": {"sym": False}}}, "transformers", 1, "", "no",
     "ct_asym_mixed"),
    ("W8A8", {}, "vllm", 1, "cpu", "loads", ""),
    ("W8A8", {"moe": True}, "transformers", 1, "", "no", "ct_moe_transformers"),
    ("FP8_BLOCK", {"moe": True}, "transformers", 1, "", "no", "ct_moe_transformers"),
    ("FP8_BLOCK", {"moe": True}, "vllm", 1, "cpu", "limits", "amx_blocks"),
    ("FP8_DYNAMIC", {"moe": True}, "transformers", 1, "", "loads", ""),
    ("FP8_DYNAMIC", {"moe": True}, "vllm", 1, "cpu", "no", "ct_fp8_moe_cpu"),
    ("FP8_DYNAMIC", {}, "vllm", 1, "cpu", "loads", ""),
    ("MXFP8A16", {"moe": True}, "transformers", 1, "", "no", "ct_moe_transformers"),
    ("MXFP4A16", {"moe": True}, "transformers", 1, "", "loads", ""),
    ("MXFP4", {}, "vllm", 1, "cpu", "no", "ct_mx_cpu"),
    ("MXFP4", {"config": {"dtype": "float16"}}, "transformers", 1, "", "limits", "mx_bf16"),
    ("MXFP4", {}, "sglang", 1, "", "limits", "ct_mx_sglang"),
    ("MXFP6A16", {}, "vllm", 1, "", "no", "ct_mxfp6"),
    ("MXFP6A16", {}, "transformers", 1, "", "loads", ""),
    ("FP8_BLOCK", {"inner": 1056}, "transformers", 1, "", "no", "block_sides"),
    ("FP8_BLOCK", {"inner": 1056}, "vllm", 1, "", "no", "fp8_blocks"),  # gate ends inside a block of gate_up
    ("FP8_BLOCK@fp8", {"inner": 1056}, "vllm", 1, "", "no", "fp8_blocks"),  # it loads, and computes nonsense
    ("FP8_BLOCK", {}, "vllm", 4, "", "no", "fp8_blocks"),  # 256 rows of k over 4 are 64
    ("FP8_BLOCK", {"kv_rows": 512, "config": {"num_key_value_heads": 8}}, "vllm", 4, "", "loads", ""),
    ("FP8_BLOCK", {"kv_rows": 512, "config": {"num_key_value_heads": 8}}, "vllm", 8, "", "no", "fp8_blocks"),
    ("W4A16@gptq", {}, "vllm", 4, "", "loads", ""),
    ("W4A16@gptq", {}, "vllm", 8, "", "no", "tp_groups"),  # o_proj: 64 columns of a group of 128
    ("W4A16@gptq", {"group_size": 64}, "vllm", 8, "", "loads", ""),
    ("W4A16@gptq", {"group_size": 64}, "sglang", 3, "", "no", "tp_heads"),
    ("W4A16@gptq", {"group_size": -1, "inner": 1056}, "vllm", 8, "", "no", "tp_words"),  # 132 rows are 16.5 words
    ("W4A16@gptq", {"group_size": 64, "inner": 1056, "ragged": "keep"}, "vllm", 64, "", "no", "tp_rows"),
    ("W4A16@gptq", {"group_size": 16}, "vllm", 1, "", "limits", "gptq_groups"),
    ("W8A16@gptq", {}, "vllm", 1, "cpu", "no", "gptq_cpu"),
    ("W3A16@gptq", {}, "vllm", 1, "", "no", "gptq_kinds"),
    ("W4A16@gptq", {"symmetric": False}, "sglang", 1, "", "no", "gptq_asym"),
    ("W4A16@gptq", {}, "transformers", 1, "", "loads", ""),
    ("W4A16@gptq", {"group_size": -1}, "transformers", 1, "", "limits", "gptq_channel"),
    ("W4A16@gptq", {"moe": True}, "transformers", 1, "", "no", "gptq_moe"),
    ("W4A16@gptq", {"moe": True}, "vllm", 1, "cpu", "limits", "amx_experts"),
    ("W4A16@gptq", {"moe": True}, "vllm", 1, "", "loads", ""),
    ("W4A16@gptq", {"quant_lm_head": True}, "transformers", 1, "", "no", "head_garbage"),
    ("W4A16@gptq", {"quant_lm_head": True}, "vllm", 1, "", "loads", ""),
    ("W4A16@gptq", {"layer_config": {"**.o_proj": {"bits": 8}}}, "transformers", 1, "", "no", "gptq_exceptions"),
    ("W4A16@gptq", {"layer_config": {"**.o_proj": {"bits": 8}}}, "vllm", 1, "", "limits", "gptq_cpu"),
    ("W4A16@gptq", {"layer_config": {"re:.*[qkv]_proj": {"bits": 8}}}, "vllm", 1, "", "limits", "gptq_cpu"),
    ("W4A16@gptq", {}, "mlx", 1, "", "no", "gptq_mlx"),
    ("W4A16@auto_round", {}, "vllm", 1, "cpu", "loads", ""),
    ("W8A16@auto_round", {}, "vllm", 1, "cpu", "no", "auto_round_cpu"),
    ("W2A16@auto_round", {}, "vllm", 1, "", "no", "auto_round_bits_vllm"),
    ("W4A16@auto_round", {"symmetric": False}, "vllm", 1, "", "no", "auto_round_packing"),
    ("W4A16@auto_round", {"symmetric": False}, "transformers", 1, "", "loads", ""),
    ("W4A16@auto_round", {"moe": True}, "vllm", 1, "cpu", "no", "auto_round_moe_cpu"),
    ("W4A16@auto_round", {"moe": True}, "transformers", 1, "", "loads", ""),
    ("W4A16@auto_round", {"layer_config": {"**.experts.0.*": {"bits": 8}}, "moe": True}, "vllm", 1, "", "no",
     "experts_differ"),
    ("W4A16@compressed-tensors", {"config": {"tie_word_embeddings": True}}, "vllm", 1, "", "limits",
     "tied_head_written"),
    ("W4A16@compressed-tensors", {"quant_lm_head": True}, "vllm", 1, "", "loads", ""),  # a target names it
]  # fmt: skip


@pytest.mark.parametrize(("scheme", "options", "engine", "tp", "device", "answer", "fact"), OWN)
def test_verdicts_on_own_outputs(
    serve: Callable[..., Served], scheme: str, options: dict[str, Any], engine: str, tp: int, device: str, answer: str,
    fact: str,
) -> None:  # fmt: skip
    found, facts = said(serve(scheme, **options), engine, tp, device)
    assert found == answer, facts
    assert fact in facts if fact else answer == "loads"


# --- what others write: headers and configurations by hand ----------------------------------------


def edited(served: Served, drop: str = "", add: Tensors | None = None, **block: Any) -> Served:
    tensors = {n: t for n, t in served.tensors.items() if not (drop and n.endswith(drop))} | (add or {})
    config = {**served.config, "quantization_config": {**served.block, **block}}
    return read_served(tensors, config)


def test_a_list_that_ignores_a_part_of_a_fused_group(serve: Callable[..., Served]) -> None:
    made = serve("W4A16@compressed-tensors", ignore=["**.self_attn.*"])
    whole = said(made, "vllm")[0]
    q = P + "self_attn.q_proj"
    add: Tensors = {f"{q}.weight_packed": ("I32", (512, 64)), f"{q}.weight_scale": ("BF16", (512, 4))}
    split = edited(made, drop="q_proj.weight", add=add, ignore=[n for n in made.block["ignore"] if n != q])
    assert whole == "loads"
    assert said(split, "vllm") == ("no", {"fused_split"})
    assert said(split, "transformers")[0] == "loads"


@pytest.mark.parametrize("engine", ["vllm", "sglang", "transformers"])
def test_plain_tensors_that_no_list_names(serve: Callable[..., Served], engine: str) -> None:
    made = serve("W4A16@compressed-tensors", ignore=["**.self_attn.*"])
    assert "not_ignored" in said(edited(made, ignore=["lm_head"]), engine)[1]
    assert said(edited(made, ignore=["lm_head", "re:.*self_attn.*"]), engine)[0] == "loads"


def test_quantized_tensors_that_a_list_names(serve: Callable[..., Served]) -> None:
    made = edited(serve("W4A16@compressed-tensors"), ignore=["lm_head", P + "mlp.down_proj"])
    assert said(made, "vllm") == ("no", {"ignored_but_quantized"})


def test_prediction_layers_and_routers_that_no_list_names(serve: Callable[..., Served]) -> None:
    made = serve("W4A16@compressed-tensors", moe=True, extra={"mtp.layers.0.mlp.up_proj.weight": ("BF16", (512, 512))})
    assert said(made, "vllm")[0] == "loads"
    assert said(edited(made, ignore=["lm_head"]), "vllm") == ("limits", {"mtp_not_ignored", "router_not_ignored"})


def test_expressions_with_a_prefix_in_a_model_with_parts(serve: Callable[..., Served]) -> None:
    made = serve("W4A16@compressed-tensors", config={"vision_config": {}})
    assert "anchored_patterns" in said(edited(made, ignore=["re:model.layers.*lm_head"]), "vllm")[1]
    assert "anchored_patterns" not in said(edited(made, ignore=["re:.*lm_head$"]), "vllm")[1]


def test_heads(serve: Callable[..., Served]) -> None:
    made = serve("W4A16@compressed-tensors", quant_lm_head=True)
    group = made.block["config_groups"]["group_0"]
    unnamed = edited(made, config_groups={"group_0": {**group, "targets": ["Linear"]}})
    assert said(unnamed, "vllm") == ("no", {"head_not_named"})
    tied = read_served(made.tensors, {**made.config, "tie_word_embeddings": True})
    assert said(tied, "vllm") == ("no", {"tied_head_quantized"})


def test_static_activations_without_scales(serve: Callable[..., Served]) -> None:
    made = serve("FP8_DYNAMIC")
    group = made.block["config_groups"]["group_0"]
    static = {**group["input_activations"], "dynamic": False, "strategy": "tensor"}
    declared = edited(made, config_groups={"group_0": {**group, "input_activations": static}})
    assert said(declared, "transformers") == ("no", {"static_scales"})
    scales: Tensors = {f"{m.name}.input_scale": ("BF16", (1,)) for m in declared.quantized}
    assert said(read_served({**declared.tensors, **scales}, declared.config), "transformers")[0] == "loads"


def test_zero_points_of_symmetric_schemes(serve: Callable[..., Served]) -> None:
    made = serve("W4A16@compressed-tensors")
    zeros: Tensors = {P + "mlp.up_proj.weight_zero_point": ("I32", (128, 4))}
    assert "ct_zero_points" in said(edited(made, add=zeros), "vllm")[1]


def nvfp4(prefix: str, inputs: bool) -> Tensors:
    tensors: Tensors = {}
    for name in ("gate_proj", "up_proj"):
        m = prefix + name
        tensors |= {
            f"{m}.weight_packed": ("U8", (256, 256)),
            f"{m}.weight_scale": ("F8_E4M3", (256, 32)),
            f"{m}.weight_global_scale": ("F32", (1,)),
        }
        if inputs:
            tensors[f"{m}.input_global_scale"] = ("F32", (1,))
    return tensors


def nvfp4_config(activation: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "float"}, "input_activations": activation}
    block = {
        "quant_method": "compressed-tensors",
        "format": "nvfp4-pack-quantized",
        "config_groups": {"group_0": group},
    }
    return {"quantization_config": block}


def test_nvfp4() -> None:
    weight_only = read_served(nvfp4(P + "mlp.", False), nvfp4_config(None))
    assert {m.stored.name for m in weight_only.quantized if m.stored} == {"fp4 g16"}
    assert said(weight_only, "transformers")[0] == "loads"
    assert said(weight_only, "vllm", device="cpu") == ("no", {"ct_mx_cpu"})
    local = {"num_bits": 4, "dynamic": "local"}
    assert said(read_served(nvfp4(P + "mlp.", False), nvfp4_config(local)), "transformers") == ("no", {"fp4_inputs"})
    assert said(read_served(nvfp4(P + "mlp.", True), nvfp4_config(local)), "transformers")[0] == "loads"
    experts = read_served(nvfp4(P + "mlp.experts.0.", False), nvfp4_config(None))
    assert said(experts, "transformers") == ("no", {"ct_moe_fp4"})


def awq(moe: bool = False) -> tuple[Tensors, dict[str, Any]]:
    m = P + ("mlp.experts.0." if moe else "mlp.") + "down_proj"
    tensors: Tensors = {
        f"{m}.qweight": ("I32", (1024, 64)), f"{m}.qzeros": ("I32", (8, 64)), f"{m}.scales": ("F16", (8, 512)),
    }  # fmt: skip
    block = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}
    return tensors, {**CONFIG, "quantization_config": block}


def test_awq() -> None:
    served = read_served(*awq())
    module = served.quantized[0]
    assert (module.rows, module.columns) == (512, 1024)
    assert module.stored is not None
    assert module.stored.name == "int4 g128 asym"
    assert said(served, "vllm", 8) == ("loads", set())
    assert said(served, "vllm", 16) == ("no", {"tp_heads", "tp_groups"})
    assert said(edited(served, drop=".qzeros"), "transformers") == ("no", {"qzeros"})
    assert said(read_served(*awq(moe=True)), "transformers") == ("no", {"gptq_moe"})


def test_gptq_without_parts(serve: Callable[..., Served]) -> None:
    made = serve("W4A16@gptq")
    assert said(edited(made, drop=".g_idx"), "transformers") == ("no", {"gptq_g_idx"})
    assert said(edited(made, drop=".g_idx"), "vllm") == ("loads", set())
    assert said(edited(made, desc_act=True), "vllm") == ("no", {"gptq_order"})


def native_fp8(scale: tuple[int, ...], ignore: list[str]) -> Served:
    tensors: Tensors = {
        P + "mlp.up_proj.weight": ("F8_E4M3", (1024, 512)),
        P + "mlp.up_proj.weight_scale_inv": ("F32", scale),
        P + "self_attn.o_proj.weight": ("BF16", (512, 512)),
    }
    block = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128],
             "modules_to_not_convert": ignore}  # fmt: skip
    return read_served(tensors, {**CONFIG, "quantization_config": block})


def test_native_fp8() -> None:
    full = [P + "self_attn.o_proj"]
    for engine in ("vllm", "sglang", "transformers"):
        assert said(native_fp8((8, 4), full), engine)[0] == "loads"
        assert said(native_fp8((8, 4), ["o_proj"]), engine) == ("no", {"not_ignored"})  # full names only
    assert said(native_fp8((1,), full), "vllm", device="cpu") == ("no", {"fp8_tensor"})


def mlx(module: str, stacked: bool) -> Served:
    lead = (4,) if stacked else ()
    tensors: Tensors = {
        f"{module}.weight": ("U32", (*lead, 1024, 64)),
        f"{module}.scales": ("BF16", (*lead, 1024, 8)),
        f"{module}.biases": ("BF16", (*lead, 1024, 8)),
    }
    return read_served(tensors, {**CONFIG, "quantization": {"group_size": 64, "bits": 4, "mode": "affine"}})


def test_mlx() -> None:
    served = mlx(P + "mlp.up_proj", False)
    assert [(m.rows, m.columns, m.stored.name) for m in served.quantized if m.stored] == [(1024, 512, "int4 g64 asym")]
    assert said(served, "mlx") == ("loads", set())
    assert {said(served, e)[0] for e in ("vllm", "sglang", "transformers", "llama.cpp")} == {"no"}
    assert said(mlx(P + "mlp.switch_mlp.up_proj", True), "mlx")[0] == "loads"
    assert said(mlx(P + "mlp.experts.0.up_proj", False), "mlx") == ("no", {"mlx_experts"})


def test_gpt_oss_blocks() -> None:
    m = P + "mlp.experts.gate_up_proj"
    tensors: Tensors = {f"{m}_blocks": ("U8", (4, 64, 16, 16)), f"{m}_scales": ("U8", (4, 64, 16))}
    config = {"quantization_config": {"quant_method": "mxfp4"}}
    assert said(read_served(tensors, {**config, "model_type": "gpt_oss"}), "vllm")[0] == "loads"
    assert said(read_served(tensors, {**config, "model_type": "llama"}), "vllm") == ("limits", {"mxfp4_models"})


@pytest.mark.parametrize(
    ("method", "kept", "expected"),
    [
        ("gptq", False, ("no", {"gpt_oss_experts_gptqmodel", "gptq_moe"})),
        ("gptq", True, ("loads", set())),
        ("auto-round", False, ("no", {"gpt_oss_experts_auto_round"})),
        ("auto-round", True, ("no", {"gpt_oss_experts_auto_round"})),
    ],
)
def test_experts_of_gpt_oss(method: str, kept: bool, expected: tuple[str, set[str]]) -> None:
    """One by one they have no place in transformers; stacks have."""
    codes = {
        "qweight": ("I32", (8, 32)),
        "scales": ("F16", (1, 32)),
        "qzeros": ("I32", (1, 4)),
        "g_idx": ("I32", (64,)),
    }
    modules = [P + "self_attn.o_proj", *([] if kept else [P + "mlp.experts.0.down_proj"])]
    tensors: Tensors = {f"{m}.{part}": tensor for m in modules for part, tensor in codes.items()}
    tensors |= {P + "mlp.experts.down_proj": ("BF16", (4, 32, 64))} if kept else {}
    block = {"quant_method": method, "bits": 4, "group_size": 64, "sym": True}
    served = read_served(tensors, {"quantization_config": block, "model_type": "gpt_oss"})
    assert said(served, "transformers") == expected


def test_a_configuration_below_another_or_none_at_all(serve: Callable[..., Served]) -> None:
    made = serve("W4A16@compressed-tensors")
    config = {k: v for k, v in made.config.items() if k != "quantization_config"}
    nested = read_served(made.tensors, {**config, "text_config": {"quantization_config": made.block}})
    assert said(nested, "vllm") == ("limits", {"nested_config"})
    assert {said(read_served(made.tensors, config), e)[0] for e in ("vllm", "transformers", "mlx")} == {"no"}


def test_an_unquantized_checkpoint_is_left_alone() -> None:
    served = read_served(source(moe=False), CONFIG)
    assert {said(served, e)[0] for e in ("vllm", "sglang", "transformers", "mlx")} == {"loads"}


HOSTILE: list[dict[str, Any]] = [
    {"quant_method": 4},
    {"quant_method": "compressed-tensors", "config_groups": [1], "ignore": "x"},
    {"quant_method": "compressed-tensors", "config_groups": {"a": {"targets": ["re:("], "weights": 3}}},
    {"quant_method": "gptq", "bits": "four", "dynamic": ["x"]},
    {"quant_method": "fp8", "weight_block_size": 128, "modules_to_not_convert": None},
    {"quant_method": "auto-round", "extra_config": {"re:(": 1, "a": None}, "block_name_to_quantize": 3},
]


@pytest.mark.parametrize("block", HOSTILE)
def test_configurations_with_unexpected_types_are_judged(serve: Callable[..., Served], block: dict[str, Any]) -> None:
    for scheme in ("W4A16@gptq", "FP8_BLOCK", "MXFP4"):
        tensors = serve(scheme).tensors
        assert len(judge(read_served(tensors, {**CONFIG, "quantization_config": block}), 2)) == len(
            load_facts().engines
        )


# --- the table, targets, the report ------------------------------------------------------------------


def test_every_row_has_a_source_and_an_id_of_its_own() -> None:
    facts = load_facts().facts
    assert len({f.id for f in facts}) == len(facts)
    assert all(f.source and f.reason for f in facts)
    assert all(e.version and e.source for e in load_facts().engines)


def test_a_row_with_an_unknown_check_is_a_bug() -> None:
    text = """
    [[engine]]
    id = 'x'
    version = '1'
    methods = []
    unknown = 'u'
    source = 's'
    fuses = false
    parallel = false
    [[fact]]
    id = 'f'
    engines = ['x']
    answer = 'no'
    check = 'no_such_test'
    reason = 'r'
    source = 's'
    """
    with pytest.raises(ValueError, match="row f"):
        parse_facts(text)


def test_targets() -> None:
    assert parse_target("vllm") == Target("vllm")
    assert parse_target("vLLM:tp=8,device=cpu") == Target("vllm", 8, "cpu")
    assert parse_target("vllm:tp=8,device=cpu").text == "vllm:tp=8,device=cpu"
    for text in ("ollama", "vllm:tp=0", "vllm:pp=2", "vllm:tp=x"):
        with pytest.raises(BadOption, match="--target"):
            parse_target(text)
    assert may_split([Target("transformers"), Target("mlx")])
    assert not may_split([Target("transformers"), Target("vllm")])
    assert not may_split([])


def test_a_target_that_says_no_is_a_refusal(serve: Callable[..., Served]) -> None:
    served = serve("W4A16@gptq")
    check_targets(served, [Target("vllm", 4), Target("transformers")])
    with pytest.raises(TargetRefuses, match=r"--target vllm:tp=8: vllm .*part of a group: model\.layers\.0.*o_proj"):
        check_targets(served, [Target("vllm", 8)])
    check_targets(serve("W8A16@gptq"), [Target("vllm")])  # a limit is none
    with pytest.raises(TargetRefuses, match="4 bits only"):
        check_targets(serve("W8A16@gptq"), [Target("vllm", 1, "cpu")])


def test_the_report_names_devices_and_sources(serve: Callable[..., Served]) -> None:
    report = {e["engine"]: e for e in describe_serving(serve("W4A16@gptq"))}
    served = serve("FP8_BLOCK")
    for engine, by_size in parallel_verdicts(served).items():
        for tp, verdict in by_size.items():
            assert (engine, verdict) in [(v.engine, v) for v in judge(served, tp)]
    assert [v["answer"] for v in report["vllm"]["tensor_parallel"].values()] == ["loads", "loads", "loads", "no"]
    reason = report["vllm"]["tensor_parallel"]["8"]["reasons"][0]
    assert (reason["fact"], reason["count"]) == ("tp_groups", 1)
    assert reason["source"]
    assert report["mlx"]["tensor_parallel"] == {}


def test_rules_of_gptq_that_name_no_fused_matrix(serve: Callable[..., Served]) -> None:
    """As other tools write them: vLLM asks for the name of the fused matrix only."""
    served = serve("W4A16@gptq", layer_config={"re:.*[qkv]_proj": {"bits": 8}})
    rules = {k: v for k, v in served.block["dynamic"].items() if "qkv" not in k}
    assert len(rules) < len(served.block["dynamic"])
    found, facts = said(replace(served, block={**served.block, "dynamic": rules}), "vllm", 1, "")
    assert (found, "gptq_rules_fused" in facts) == ("no", True)
