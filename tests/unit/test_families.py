"""What families and options change about the default rule: policies, parts beside the text model, diffusers folders."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from shardq.checkpoint import TensorRef
from shardq.decide import Decision, decide
from shardq.errors import BadOption
from shardq.policy import kept_modules
from shardq.recipe import make_recipe
from shardq.roles import Role, assign_roles, prediction_tensors
from shardq.stacks import find_stacks

L = "model.layers.5."
DUMPS = Path(__file__).parents[1] / "data" / "hub_index"

POLICIES: list[tuple[str, dict[str, Any], list[str], list[str]]] = [
    # model type, more of the config, kept, quantized
    ("llama4_text", {}, [L + "self_attn.q_proj", L + "feed_forward.shared_expert.up_proj"],
     [L + "feed_forward.experts.3.up_proj", L + "feed_forward.down_proj"]),
    ("nemotron_h", {}, ["backbone.layers.5.mixer.q_proj", "backbone.layers.5.mixer.fc1_latent_proj"],
     ["backbone.layers.5.mixer.in_proj", "backbone.layers.5.mixer.experts.1.up_proj"]),
    ("deepseek_v4", {}, ["layers.5.attn.wo_a"], ["layers.5.attn.wo_b", "layers.5.attn.wq_a"]),
    ("deepseek_v3", {}, [L + "self_attn.q_a_proj", L + "self_attn.kv_a_proj_with_mqa"],
     [L + "self_attn.q_b_proj", L + "mlp.shared_experts.up_proj"]),
    ("mistral4", {}, [L + "self_attn.q_a_proj", L + "mlp.shared_experts.up_proj"], [L + "self_attn.q_b_proj"]),
    ("glm4_moe", {"first_k_dense_replace": 6}, [L + "mlp.up_proj"], [L + "self_attn.q_proj"]),
    ("glm4_moe", {"first_k_dense_replace": 5}, [], [L + "mlp.up_proj", L + "self_attn.q_proj"]),
    ("glm4_moe", {}, [], [L + "mlp.up_proj"]),
    ("glm5_next", {"text_config": {"first_k_dense_replace": 6}}, [L + "mlp.up_proj", L + "self_attn.q_proj"],
     ["model.layers.6.mlp.experts.0.up_proj"]),
    ("step3p5", {}, [L + "share_expert.up_proj"], [L + "self_attn.q_proj"]),
    ("kimi_k25", {}, [L + "self_attn.q_b_proj", L + "mlp.shared_experts.up_proj"], [L + "mlp.experts.7.up_proj"]),
    ("minimax_m3_vl_text", {}, [L + "self_attn.q_proj"], [L + "block_sparse_moe.experts.7.w1"]),
    ("t5", {}, ["encoder.block.5.layer.1.DenseReluDense.wo"], ["encoder.block.5.layer.1.DenseReluDense.wi"]),
    ("qwen3_moe", {}, [], [L + "self_attn.q_proj"]),
]  # fmt: skip


@pytest.mark.parametrize(("model_type", "more", "kept", "quantized"), POLICIES)
def test_published_policy(model_type: str, more: dict[str, Any], kept: list[str], quantized: list[str]) -> None:
    config = {"model_type": model_type, **more}
    assert list(kept_modules([*kept, *quantized], config, "published")) == kept
    assert kept_modules([*kept, *quantized], config, "all") == {}
    assert kept_modules([*kept, *quantized], None, "published") == {}


def model(make_checkpoint: Any, config: dict[str, Any], *modules: str, shape: tuple[int, ...] = (256, 256)) -> Any:
    return make_checkpoint({"a.safetensors": {f"{m}.weight": ("BF16", shape) for m in modules}}, config)


def told(decisions: tuple[Decision, ...]) -> dict[str, tuple[str, str]]:
    return {d.tensor.module: (d.action, d.rule) for d in decisions}


def test_counts_of_deepseek_v4_flash() -> None:
    """33,024 routed, 129 shared, 215 of attention; 778 of the prediction layer; the policy keeps wo_a of each layer."""
    experts = [f"ffn.experts.{e}.w{w}" for e in range(256) for w in (1, 2, 3)]
    shared = [f"ffn.shared_experts.w{w}" for w in (1, 2, 3)]
    attention = [f"attn.{m}" for m in ("wq_a", "wq_b", "wkv", "wo_a", "wo_b")]
    kept = ["attn.compressor.wkv", "attn.indexer.wq_b", "ffn.gate"]
    names = [f"layers.{n}.{m}" for n in range(43) for m in (*experts, *shared, *attention, *kept)]
    names += [f"mtp.0.{m}" for m in (*experts, *shared, *attention, "e_proj", "h_proj")]
    refs = [TensorRef(f"{n}.weight", "x", "BF16", (2048, 4096), 0, 0) for n in names]
    config = {"model_type": "deepseek_v4", "num_hidden_layers": 43, "n_routed_experts": 256}
    roles = {n.removesuffix(".weight"): v.role for n, v in assign_roles(refs, config).items()}
    linear = [n for n in names if roles[n] is Role.LINEAR]
    assert (len(linear), sum(r is Role.MTP for r in roles.values())) == (33_368, 778)
    assert len(linear) - len(kept_modules(linear, config, "published")) == 33_325


def test_counts_of_mistral_small_4() -> None:
    """Its published W4A16: 36 x (q_b, kv_b, o) and 36 x 128 x 3 of the experts; 180 matrices of the text are kept."""
    attention = [f"self_attn.{m}" for m in ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")]
    shared = [f"mlp.shared_experts.{m}_proj" for m in ("gate", "up", "down")]
    names = [f"model.language_model.layers.{n}.{m}" for n in range(36) for m in (*attention, *shared)]
    refs = [TensorRef(f"{n}.weight", "x", "BF16", (512, 4096), 0, 0) for n in names]
    stacks = {f"model.language_model.layers.{n}.mlp.experts.{m}": shape for n in range(36)
              for m, shape in (("gate_up_proj", (128, 4096, 4096)), ("down_proj", (128, 4096, 2048)))}  # fmt: skip
    refs += [TensorRef(n, "x", "BF16", shape, 0, 0) for n, shape in stacks.items()]
    config = {"model_type": "mistral3", "text_config": {"model_type": "mistral4", "n_routed_experts": 128}}
    linear = [n for n in names if assign_roles(refs, config)[f"{n}.weight"].role is Role.LINEAR]
    kept = kept_modules(linear, config, "published")
    matrices = sum(1 for s in find_stacks(refs, config) for _ in s.matrices())
    assert (len(kept), len(linear) - len(kept) + matrices) == (180, 13_932)


def test_policy_keeps_and_a_user_may_include(make_checkpoint: Any) -> None:
    names = [L + f"self_attn.{m}" for m in ("q_a_proj", "kv_a_proj_with_mqa", "q_b_proj")]
    c = model(make_checkpoint, {"model_type": "deepseek_v3"}, *names)
    kept = told(decide(c, make_recipe("W4A16", policy="published")))
    assert [kept[n] for n in names] == [("copy", "policy:mla_a")] * 2 + [("quantize", "default")]
    assert {a for a, _ in told(decide(c, make_recipe("W4A16"))).values()} == {"quantize"}
    wanted = make_recipe("W4A16", policy="published", include=["**.q_a_proj", "**.kv_a_proj_with_mqa"])
    assert {a for a, _ in told(decide(c, wanted)).values()} == {"quantize"}


PARTS = {
    "text": ["model.language_model.layers.1.mlp.up_proj"],
    "mtp": ["mtp.layers.0.mlp.up_proj", "model.language_model.layers.2.mlp.up_proj"],
    "mtp, but no Linear of a block": ["mtp.fc", "model.language_model.layers.2.shared_head.head"],
    "nontext": ["model.visual.blocks.0.attn.qkv", "model.audio_tower.layers.3.fc1"],
    "nontext, but no Linear of a block": ["model.visual.merger"],
}
TEXT_AND_VISION = {"model_type": "x", "text_config": {"num_hidden_layers": 2}}


@pytest.mark.parametrize(
    ("words", "quantized"),
    [
        ({}, ["text"]),
        ({"mtp": "quantize"}, ["text", "mtp"]),
        ({"quant_nontext": True}, ["text", "nontext"]),
        ({"mtp": "drop"}, ["text"]),
    ],
)
def test_parts(make_checkpoint: Any, words: dict[str, Any], quantized: list[str]) -> None:
    c = model(make_checkpoint, TEXT_AND_VISION, *(m for ms in PARTS.values() for m in ms))
    got = told(decide(c, make_recipe("W4A16", **words)))
    assert {m for m in got if got[m][0] == "quantize"} == {m for part in quantized for m in PARTS[part]}
    dropped = {m for m in got if got[m][0] == "drop"}
    assert dropped == (
        {m for p, ms in PARTS.items() if p.startswith("mtp") for m in ms} if "drop" in words.values() else set()
    )


def test_all_of_a_prediction_layer_is_dropped() -> None:
    """Also its norms, router, copies of embedding and head, and the scales of a quantized source."""
    layer = [f"model.layers.61.{n}" for n in (
        "enorm.weight", "eh_proj.weight", "embed_tokens.weight", "shared_head.head.weight", "mlp.gate.weight",
        "mlp.gate.e_score_correction_bias", "mlp.experts.0.up_proj.weight", "mlp.experts.0.up_proj.weight_scale_inv",
    )]  # fmt: skip
    others = [
        "model.layers.60.input_layernorm.weight",
        "model.embed_tokens.weight",
        "vision_tower.layers.61.fc1.weight",
    ]
    refs = [TensorRef(n, "x", "BF16", None, 0, 0) for n in layer + others]
    assert prediction_tensors(refs, {"num_hidden_layers": 61}) == set(layer)
    assert prediction_tensors(refs, None) == {layer[1], layer[3]}


def test_nobody_may_ask_for_what_is_dropped(make_checkpoint: Any) -> None:
    c = model(make_checkpoint, TEXT_AND_VISION, *PARTS["text"], *PARTS["mtp"])
    with pytest.raises(BadOption, match=r"--include 'mtp\.layers\.0\.mlp\.up_proj' asks for"):
        decide(c, make_recipe("W4A16", mtp="drop", include=["mtp.layers.0.mlp.up_proj"]))


@pytest.mark.parametrize("words", [{"mtp": "none"}, {"policy": "some"}])
def test_unknown_words_are_refused(words: dict[str, Any]) -> None:
    with pytest.raises(BadOption, match="expected one of"):
        make_recipe("W4A16", **words)


DIFFUSERS: list[tuple[str, bool]] = [
    # module, whether it is quantized
    ("transformer_blocks.0.attn.to_q", True),
    ("transformer_blocks.0.attn.to_out.0", True),
    ("transformer_blocks.0.attn.add_k_proj", True),
    ("transformer_blocks.0.ff.net.0.proj", True),
    ("transformer_blocks.0.ff_context.net.2", True),
    ("transformer_blocks.0.img_mlp.net.2", True),
    ("transformer_blocks.0.norm1.linear", False),
    ("transformer_blocks.0.norm1_context.linear", False),
    ("transformer_blocks.0.img_mod.1", False),
    ("transformer_blocks.0.txt_mod.1", False),
    ("transformer_blocks.0.adaLN_modulation.1", False),
    ("single_transformer_blocks.0.proj_mlp", True),
    ("single_transformer_blocks.0.proj_out", True),
    ("single_transformer_blocks.0.norm.linear", False),
    ("blocks.0.attn1.to_k", True),
    ("blocks.0.ffn.net.0.proj", True),
    ("norm_out.linear", False),
    ("proj_out", False),
    ("img_in", False),
    ("x_embedder", False),
    ("time_text_embed.timestep_embedder.linear_1", False),
    ("condition_embedder.time_embedder.linear_1", False),
]


@pytest.mark.parametrize("config", [{"_class_name": "QwenImageTransformer2DModel", "num_layers": 60}, None])
def test_diffusers_folders(config: dict[str, Any] | None) -> None:
    refs = [TensorRef(f"{m}.weight", "x", "BF16", (256, 256), 0, 0) for m, _ in DIFFUSERS]
    verdicts = assign_roles(refs, config)
    assert {m for m, _ in DIFFUSERS if verdicts[f"{m}.weight"].role == "linear"} == {m for m, on in DIFFUSERS if on}


def test_flux_index_without_config() -> None:
    """19 double and 38 single blocks: 8 + 4 and 3 + 2 Linear layers of each without modulation."""
    names = json.loads(gzip.decompress((DUMPS / "flux-1-dev" / "model.safetensors.index.json.gz").read_bytes()))
    refs = [TensorRef(n, "x", None, None, -1, -1) for n in names["weight_map"]]
    verdicts = assign_roles(refs, None)
    linear = [n for n, v in verdicts.items() if v.role == "linear"]
    assert len(linear) == 19 * 12 + 38 * 5
    assert not [n for n in linear if ".linear." in n]


def test_of_omni_models_only_the_thinker_is_text() -> None:
    names = ["thinker.model.layers.0", "thinker.visual.blocks.0", "talker.model.layers.0", "tts.layers.0"]
    refs = [TensorRef(f"{n}.mlp.up_proj.weight", "x", "BF16", (256, 256), 0, 0) for n in names]
    config = {"model_type": "qwen3_omni_moe"}
    roles = [v.role.value for v in assign_roles(refs, config).values()]
    assert roles == ["linear", "nontext", "nontext", "nontext"]
    alone = [TensorRef("model.layers.0.mlp.up_proj.weight", "x", "BF16", (256, 256), 0, 0)]
    assert [v.role.value for v in assign_roles(alone, config).values()] == ["linear"]


def test_adapters_inside_a_model_stay() -> None:
    names = ["model.layers.0.mlp.up_proj.lora_A.speech", "model.layers.0.mlp.up_proj.lora_B.default"]
    refs = [TensorRef(f"{n}.weight", "x", "BF16", (320, 256), 0, 0) for n in names]
    assert {v.role.value for v in assign_roles(refs, None).values()} == {"nontext", "small"}
