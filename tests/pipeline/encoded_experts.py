"""Models with experts, as stacks and one by one. In every twin each expert's matrices are tensors of their own, under
the names that loaders accept; only Inkling's stay stacks, as its loaders want them."""

from collections.abc import Iterator
from functools import partial
from typing import Any, Final

from encoded_codes import (
    Encode,
    fp8,
    mlx,
    mx_blocks,
    nvfp4,
    opened,
    plain,
)
from encoded_kinds import (
    FP8_BLOCK,
    FP8_STATIC,
    mlx_block,
    named,
    native_fp8,
)
from encoded_models import (
    HEADS,
    LAYERS,
    VOCABULARY,
    Case,
    Piece,
    attention,
    ends,
    gain,
    keep,
    linears,
    mlp,
    norms,
    settings,
)
from encoded_numbers import draw_singles
from encoded_stacks import (
    EXPERTS,
    HIDDEN,
    INNER,
    PAIR,
    bias_stack,
    fused,
    separate,
    stack,
)

WIDE, NARROW, SINGLE = 256, 128, 4  # hidden size, expert size and experts of Qwen3
# Of DeepSeek's attention, with three heads: the 160 rows of kv_a are no whole blocks.
LATENT, QUERY, ROPE, NOPE, VALUE = 128, 256, 32, 64, 128
TEXT: Final = "model.language_model"


# --- families with stacks ------------------------------------------------------------------------------------------


def layers(prefix: str = "model", encode: Encode = plain) -> Iterator[tuple[str, Iterator[Piece]]]:
    """Each layer's name, and all of it but the experts."""
    for name in (f"{prefix}.layers.{n}" for n in range(LAYERS)):
        yield name, (p for ps in (attention(f"{name}.self_attn", HIDDEN, encode), norms(name, HIDDEN)) for p in ps)


def gpt_oss(encode: Encode, turned: bool) -> Iterator[Piece]:
    """Biases everywhere; gate and up take turns."""
    for layer, rest in layers():
        yield from rest
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            rows = {"q_proj": HEADS, "o_proj": HIDDEN}.get(name, HEADS // 2)
            yield keep(f"{layer}.self_attn.{name}.bias", rows)
        yield keep(f"{layer}.self_attn.sinks", 6)
        yield keep(f"{layer}.mlp.router.weight", EXPERTS, HIDDEN)
        yield keep(f"{layer}.mlp.router.bias", EXPERTS)
        at = f"{layer}.mlp.experts"
        yield from fused(at, encode, alternate=True, turned=turned)
        yield bias_stack(f"{at}.gate_up_proj_bias", at, PAIR, 2 * INNER)
        yield bias_stack(f"{at}.down_proj_bias", at, ("down_proj",), HIDDEN)
    yield from ends(HIDDEN)


def qwen3_vl() -> Iterator[Piece]:
    """[inputs, outputs] in halves, beside a vision tower."""
    for layer, rest in layers(TEXT):
        yield from rest
        yield keep(f"{layer}.mlp.gate.weight", EXPERTS, HIDDEN)
        yield from fused(f"{layer}.mlp.experts", turned=True)
    yield keep("model.visual.blocks.0.attn.qkv.weight", 3 * 80, 80)
    yield from ends(HIDDEN, TEXT)


def qwen3_5() -> Iterator[Piece]:
    """[outputs, inputs] in halves, a shared expert, and a prediction layer."""
    for layer, rest in layers(TEXT):
        yield from rest
        yield keep(f"{layer}.mlp.gate.weight", EXPERTS, HIDDEN)
        yield from fused(f"{layer}.mlp.experts")
        yield from mlp(f"{layer}.mlp.shared_expert", HIDDEN, INNER)
        yield keep(f"{layer}.mlp.shared_expert_gate.weight", 1, HIDDEN)
    yield keep("mtp.fc.weight", HIDDEN, 2 * HIDDEN)
    yield from mlp("mtp.layers.0.mlp", HIDDEN, INNER)
    yield from ends(HIDDEN, TEXT)


def step() -> Iterator[Piece]:
    """A dense layer, and one of FP8 stacks that have blocks of scales in each slice."""
    for number, (layer, rest) in enumerate(layers(encode=FP8_BLOCK)):
        yield from rest
        if number == 0:
            yield from mlp(f"{layer}.mlp", HIDDEN, 512, FP8_BLOCK)
            continue
        yield keep(f"{layer}.moe.gate.weight", EXPERTS, HIDDEN)
        yield keep(f"{layer}.moe.router_bias", EXPERTS)
        yield from separate(f"{layer}.moe", f"{layer}.moe.experts", FP8_BLOCK)
        yield from mlp(f"{layer}.share_expert", HIDDEN, 640, FP8_BLOCK)
    yield from ends(HIDDEN)


def mistral4() -> Iterator[Piece]:
    """FP8 with one scale for each slice, and for its activations."""
    scalars = fp8(".weight_scale_inv", draw_singles, 0, 0, ".weight_activation_scale")
    for layer, rest in layers(encode=FP8_STATIC):
        yield from rest
        yield keep(f"{layer}.mlp.gate.weight", EXPERTS, HIDDEN)
        yield from fused(f"{layer}.mlp.experts", scalars)
    yield from ends(HIDDEN)


def granite() -> Iterator[Piece]:
    """Stacks that are the weights of modules, beside a shared MLP whose names are the same."""
    for layer, rest in layers():
        yield from rest
        at = f"{layer}.block_sparse_moe"
        yield keep(f"{at}.router.layer.weight", EXPERTS, HIDDEN)
        yield stack(f"{at}.input_linear", f"{at}.experts", PAIR, (2 * INNER, HIDDEN))
        yield stack(f"{at}.output_linear", f"{at}.experts", ("down_proj",), (HIDDEN, INNER))
        yield from linears(f"{layer}.shared_mlp", {"input_linear": (512, HIDDEN), "output_linear": (HIDDEN, 256)})
    yield from ends(HIDDEN)


def mlx_switch() -> Iterator[Piece]:
    """mlx-lm's stacks, of 4 bits."""
    for layer, rest in layers(encode=mlx(4, 64)):
        yield from rest
        yield keep(f"{layer}.mlp.gate.weight", EXPERTS, HIDDEN)
        yield from separate(f"{layer}.mlp.switch_mlp", f"{layer}.mlp.experts", mlx(4, 64))
    yield from ends(HIDDEN)


def inkling() -> Iterator[Piece]:
    """NVFP4 stacks, a number above the scales of each slice; gate and up take turns."""
    bare = nvfp4(".weight", ".weight.scale", ".weight.scale2", ".weight.input_amax")
    for layer, rest in layers():
        yield from rest
        at = f"{layer}.mlp.experts"
        yield keep(f"{layer}.mlp.gate.weight", EXPERTS, HIDDEN)
        yield stack(f"{at}.w13", at, ("w1", "w3"), (2 * INNER, HIDDEN), bare, leaf="_weight", whole=True)
        yield stack(f"{at}.w2", at, ("w2",), (HIDDEN, INNER), bare, leaf="_weight", whole=True)
    yield from ends(HIDDEN)


# --- families with an expert in each tensor ------------------------------------------------------------------------


def qwen3() -> Iterator[Piece]:
    """FP8 blocks."""
    for layer in (f"model.layers.{n}" for n in range(LAYERS)):
        yield from attention(f"{layer}.self_attn", WIDE, FP8_BLOCK)
        yield from (gain(f"{layer}.self_attn.{n}_norm", 64) for n in "qk")
        yield keep(f"{layer}.mlp.gate.weight", SINGLE, WIDE)
        for number in range(SINGLE):
            yield from mlp(f"{layer}.mlp.experts.{number}", WIDE, NARROW, FP8_BLOCK)
        yield from norms(layer, WIDE)
    yield from ends(WIDE)


def latent_attention(prefix: str) -> Iterator[Piece]:
    """DeepSeek's, in FP8 blocks."""
    shapes = {
        "q_a_proj": (QUERY, HIDDEN),
        "q_b_proj": (3 * (NOPE + ROPE), QUERY),
        "kv_a_proj_with_mqa": (LATENT + ROPE, HIDDEN),
        "kv_b_proj": (3 * (NOPE + VALUE), LATENT),
        "o_proj": (HIDDEN, 3 * VALUE),
    }
    yield from linears(prefix, shapes, FP8_BLOCK)
    yield gain(f"{prefix}.q_a_layernorm", QUERY)
    yield gain(f"{prefix}.kv_a_layernorm", LATENT)


def deepseek() -> Iterator[Piece]:
    """A dense layer, one of experts, and behind them a layer that predicts another token."""
    for number in range(LAYERS + 1):
        layer = f"model.layers.{number}"
        yield from latent_attention(f"{layer}.self_attn")
        yield from norms(layer, HIDDEN)
        if number == 0:
            yield from mlp(f"{layer}.mlp", HIDDEN, 512, FP8_BLOCK)
            continue
        yield keep(f"{layer}.mlp.gate.weight", EXPERTS, HIDDEN)
        yield keep(f"{layer}.mlp.gate.e_score_correction_bias", EXPERTS, dtype="F32")
        for name in (*(f"experts.{n}" for n in range(EXPERTS)), "shared_experts"):
            yield from mlp(f"{layer}.mlp.{name}", HIDDEN, INNER, FP8_BLOCK)
    yield keep(f"{layer}.eh_proj.weight", HIDDEN, 2 * HIDDEN)
    yield from (gain(f"{layer}.{name}", HIDDEN) for name in ("enorm", "hnorm", "shared_head.norm"))
    yield from (keep(f"{layer}.{name}.weight", VOCABULARY, HIDDEN) for name in ("embed_tokens", "shared_head.head"))
    yield from ends(HIDDEN)


# --- their configurations ------------------------------------------------------------------------------------------

GPT_OSS: Final = settings(
    "GptOssForCausalLM", "gpt_oss", HIDDEN, INNER, num_local_experts=EXPERTS, num_experts_per_tok=2, attention_bias=True
)
SIZES: Final = {"moe_intermediate_size": INNER, "num_experts_per_tok": 2}
MOE: Final = {"num_experts": EXPERTS, **SIZES}
KEPT: Final = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]


def multimodal(architecture: str, model_type: str, **more: Any) -> dict[str, Any]:
    """A configuration with a text part."""
    text = settings(architecture, f"{model_type}_text", HIDDEN, 512, **MOE, **more)
    return {"architectures": text.pop("architectures"), "model_type": model_type, "text_config": text,
            "vision_config": {"hidden_size": 80}, "tie_word_embeddings": False}  # fmt: skip


STACKED: Final = (
    Case("gpt_oss", frozenset({"mxfp4_gptoss"}), {**GPT_OSS, **named("mxfp4", modules_to_not_convert=KEPT)},
         partial(gpt_oss, mx_blocks, turned=False)),
    Case("gpt_oss_bf16", frozenset(), GPT_OSS, partial(gpt_oss, opened(mx_blocks), turned=True)),
    Case("qwen3_vl_moe", frozenset(), multimodal("Qwen3VLMoeForConditionalGeneration", "qwen3_vl_moe"), qwen3_vl),
    Case("qwen3_5_moe", frozenset(), multimodal("Qwen3_5MoeForConditionalGeneration", "qwen3_5_moe"), qwen3_5),
    Case("step3p5", frozenset({"fp8_block", "fp8_3d"}),
         settings("Step3p5ForCausalLM", "step3p5", HIDDEN, 512, moe_num_experts=EXPERTS, **SIZES, **native_fp8()),
         step),
    Case("mistral4", frozenset({"fp8_static", "fp8_3d"}),
         settings("Mistral4ForCausalLM", "mistral4", HIDDEN, 512, n_routed_experts=EXPERTS, **SIZES,
                  **native_fp8(activation_scheme="static", weight_block_size=None)), mistral4),
    Case("granitemoe", frozenset(),
         settings("GraniteMoeSharedForCausalLM", "granitemoeshared", HIDDEN, INNER, num_local_experts=EXPERTS,
                  shared_intermediate_size=256), granite),
    Case("mlx_switch", frozenset({"mlx"}),
         settings("Qwen3MoeForCausalLM", "qwen3_moe", HIDDEN, 512, **MOE, **mlx_block(group_size=64, bits=4)),
         mlx_switch),
    Case("inkling", frozenset({"nvfp4_bare"}),
         settings("InklingForCausalLM", "inkling", HIDDEN, 512, n_routed_experts=EXPERTS, **SIZES), inkling),
)  # fmt: skip
SINGLE_EXPERTS: Final = (
    Case("qwen3_moe", frozenset({"fp8_block"}),
         settings("Qwen3MoeForCausalLM", "qwen3_moe", WIDE, 512, num_experts=SINGLE, num_experts_per_tok=2,
                  moe_intermediate_size=NARROW, **native_fp8()), qwen3),
    Case("deepseek_v3", frozenset({"fp8_block"}),
         settings("DeepseekV3ForCausalLM", "deepseek_v3", HIDDEN, 512, n_routed_experts=EXPERTS, n_shared_experts=1,
                  first_k_dense_replace=1, num_nextn_predict_layers=1, q_lora_rank=QUERY, kv_lora_rank=LATENT,
                  qk_rope_head_dim=ROPE, qk_nope_head_dim=NOPE, v_head_dim=VALUE, **SIZES, **native_fp8()), deepseek),
)  # fmt: skip
