"""Small models that generate, quantized as such models are published, and the same in BF16 as transformers has them.
Their dimensions differ; DeepSeek's 576 rows of kv_a are no whole blocks of 128."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, NamedTuple

import torch

WriteCheckpoint = Callable[[Path, Mapping[str, Any], Mapping[str, torch.Tensor]], Path]
Tensors = dict[str, torch.Tensor]
Named = Iterator[tuple[str, torch.Tensor]]

HIDDEN, INNER, DENSE, EXPERTS, LAYERS, VOCABULARY, HEAD = 256, 384, 640, 4, 2, 480, 64
QUERY_RANK, KEY_RANK, ROPE, NOPE, VALUE, LATENT_HEADS = 128, 512, 64, 64, 96, 4  # of DeepSeek's attention
BLOCK: Final = 128
FP8: Final = {
    "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]
}  # fmt: skip
MXFP4: Final = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
}
YARN: Final = {
    "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
    "original_max_position_embeddings": 128,
}  # fmt: skip
NIBBLES: Final = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
LARGEST: Final = {"e4m3": 448.0, "e2m1": 6.0}


class Model(NamedTuple):
    """One model: its configuration without quantization, its tensors, and how it is published."""

    config: Mapping[str, Any]
    tensors: Callable[[], Named]
    block: Mapping[str, Any]  # the published quantization_config


def write_native(kind: str, folder: Path, write_checkpoint: WriteCheckpoint) -> Path:
    """The model `kind`, a key of MODELS, as it is published: experts and attention in FP8, or experts in MXFP4."""
    model = MODELS[kind]
    tensors: Tensors = {}
    for name, weight in model.tensors():
        tensors |= _encode(name, weight, model)
    return write_checkpoint(folder, {**model.config, "quantization_config": dict(model.block)}, tensors)


def write_open(kind: str, folder: Path, write_checkpoint: WriteCheckpoint) -> Path:
    """The same weights, to the bit wherever BF16 holds them, as a model that was never quantized."""
    model = MODELS[kind]
    tensors = {name: _decode(name, weight, model) for name, weight in model.tensors()}
    return write_checkpoint(folder, model.config, tensors)


def write_rebuilt(
    kind: str, modules: Mapping[str, torch.Tensor], biases: Mapping[str, torch.Tensor], folder: Path,
    write_checkpoint: WriteCheckpoint, *, halves: bool,
) -> Path:  # fmt: skip
    """The open model with other weights, `modules`, and biases of experts, by their own names: a quantization of it as
    it was read back. Stacks are put together again, of `halves` or of rows of gate and up in turns."""
    model = MODELS[kind]
    tensors = {name: _decode(name, weight, model) for name, weight in model.tensors()}
    for name, stored in tensors.items():
        at, _, leaf = name.rpartition(".")
        if name.removesuffix(".weight") in modules:
            tensors[name] = modules[name.removesuffix(".weight")].bfloat16()
        elif leaf.startswith(("gate_up_proj", "down_proj")) and at.endswith(".experts"):
            found = biases if leaf.endswith("_bias") else modules
            parts = ("gate_proj", "up_proj") if leaf.startswith("gate_up") else ("down_proj",)
            end = ".bias" if leaf.endswith("_bias") else ""
            axis = 0 if halves else 1
            experts = [torch.stack([found[f"{at}.{e}.{p}{end}"] for p in parts], axis) for e in range(EXPERTS)]
            stack = torch.stack(experts).flatten(1, 2)
            tensors[name] = (stack if end else stack.transpose(1, 2)).contiguous().bfloat16()
            assert tensors[name].shape == stored.shape
    return write_checkpoint(folder, model.config, tensors)


# --- numbers -------------------------------------------------------------------------------------------------------


def fp8_blocks(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [rows, columns] in e4m3 and F32 scales for blocks of 128, the last of which may be short."""
    rows, columns = weight.shape
    high, wide = -(-rows // BLOCK), -(-columns // BLOCK)
    padded = torch.zeros(high * BLOCK, wide * BLOCK)
    padded[:rows, :columns] = weight.float()
    scales = padded.reshape(high, BLOCK, wide, BLOCK).abs().amax((1, 3)) / LARGEST["e4m3"]
    return (weight.float() / spread(scales, rows, columns)).to(torch.float8_e4m3fn), scales


def spread(scales: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """The scale of each place [rows, columns]."""
    return scales.repeat_interleave(BLOCK, 0)[:rows].repeat_interleave(BLOCK, 1)[:, :columns]


def mxfp4_blocks(stack: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Blocks [experts, rows, groups, 16] and exponent bytes of a stack [experts, rows, columns], group by group;
    each value is the nearest to what is given."""
    grouped = stack.float().reshape(*stack.shape[:-1], -1, 32)
    largest = grouped.abs().amax(-1, keepdim=True).clamp(min=2.0**-40)
    exponent = torch.floor(torch.log2(largest)) - 2
    codes = (grouped.unsqueeze(-1) / torch.exp2(exponent).unsqueeze(-1) - NIBBLES).abs().argmin(-1).to(torch.uint8)
    return codes[..., ::2] | codes[..., 1::2] << 4, (exponent.squeeze(-1) + 127).to(torch.uint8)


def mxfp4_values(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """F32 [experts, rows, columns] of them."""
    codes = torch.stack([blocks & 15, blocks >> 4], -1).flatten(-2)
    return (NIBBLES[codes.long()] * torch.exp2(scales.float() - 127).unsqueeze(-1)).flatten(-2)


def _encode(name: str, weight: torch.Tensor, model: Model) -> Tensors:
    if model.block is MXFP4 and weight.ndim == 3:
        blocks, scales = mxfp4_blocks(weight)
        return {f"{name}_blocks": blocks, f"{name}_scales": scales}
    if model.block is FP8 and name.endswith(("_proj.weight", "_proj_with_mqa.weight")):
        codes, scales = fp8_blocks(weight)
        return {name: codes, f"{name}_scale_inv": scales}
    return {name: weight}


def _decode(name: str, weight: torch.Tensor, model: Model) -> torch.Tensor:
    encoded = tuple(_encode(name, weight, model).values())
    if len(encoded) == 1:
        return weight
    codes, scales = encoded
    if weight.ndim == 3:
        return mxfp4_values(codes, scales).transpose(1, 2).contiguous().bfloat16()
    return (codes.float() * spread(scales, *weight.shape)).bfloat16()


# --- models --------------------------------------------------------------------------------------------------------


class Draw:
    """Random BF16 tensors, the same each time, such that every layer matters."""

    def __init__(self) -> None:
        self._rng = torch.Generator().manual_seed(29)

    def matrix(self, *shape: int) -> torch.Tensor:
        """Of weights, [..., outputs, inputs]."""
        drawn: torch.Tensor = torch.randn(*shape, generator=self._rng) / float(shape[-1]) ** 0.5
        return drawn.bfloat16()

    def norm(self, size: int) -> torch.Tensor:
        """Of a norm."""
        return (1 + 0.1 * torch.randn(size, generator=self._rng)).bfloat16()

    def bias(self, *shape: int) -> torch.Tensor:
        """Of an addend."""
        return (0.2 * torch.randn(*shape, generator=self._rng)).bfloat16()

    def ends(self) -> Named:
        """What is outside of layers."""
        yield "model.embed_tokens.weight", torch.randn(VOCABULARY, HIDDEN, generator=self._rng).bfloat16()
        yield "model.norm.weight", self.norm(HIDDEN)
        yield "lm_head.weight", 3 * self.matrix(VOCABULARY, HIDDEN)

    def layer_norms(self, at: str) -> Named:
        """Both norms of a layer."""
        yield f"{at}.input_layernorm.weight", self.norm(HIDDEN)
        yield f"{at}.post_attention_layernorm.weight", self.norm(HIDDEN)

    def attention(self, at: str, heads: int, keys: int) -> Named:
        """q, k, v and o."""
        for name, count in (("q_proj", heads), ("k_proj", keys), ("v_proj", keys)):
            yield f"{at}.{name}.weight", self.matrix(count * HEAD, HIDDEN)
        yield f"{at}.o_proj.weight", self.matrix(HIDDEN, heads * HEAD)

    def mlp(self, at: str, inner: int) -> Named:
        """gate, up and down."""
        yield f"{at}.gate_proj.weight", self.matrix(inner, HIDDEN)
        yield f"{at}.up_proj.weight", self.matrix(inner, HIDDEN)
        yield f"{at}.down_proj.weight", self.matrix(HIDDEN, inner)


def qwen3_moe() -> Named:
    """Experts one by one."""
    draw = Draw()
    for at in (f"model.layers.{n}" for n in range(LAYERS)):
        yield from draw.attention(f"{at}.self_attn", 8, 2)
        for name in ("q_norm", "k_norm"):
            yield f"{at}.self_attn.{name}.weight", draw.norm(HEAD)
        yield from draw.layer_norms(at)
        yield f"{at}.mlp.gate.weight", draw.matrix(EXPERTS, HIDDEN)
        for expert in range(EXPERTS):
            yield from draw.mlp(f"{at}.mlp.experts.{expert}", INNER)
    yield from draw.ends()


def gpt_oss() -> Named:
    """Stacks [experts, outputs, inputs], gate and up in turns; BF16 has them [experts, inputs, outputs]."""
    draw = Draw()
    for at in (f"model.layers.{n}" for n in range(LAYERS)):
        for name, weight in draw.attention(f"{at}.self_attn", 8, 2):
            yield name, weight
            yield name.replace(".weight", ".bias"), draw.bias(len(weight))
        yield f"{at}.self_attn.sinks", draw.bias(8)
        yield from draw.layer_norms(at)
        yield f"{at}.mlp.router.weight", draw.matrix(EXPERTS, HIDDEN)
        yield f"{at}.mlp.router.bias", draw.bias(EXPERTS)
        yield f"{at}.mlp.experts.gate_up_proj", draw.matrix(EXPERTS, 2 * INNER, HIDDEN)
        yield f"{at}.mlp.experts.gate_up_proj_bias", draw.bias(EXPERTS, 2 * INNER)
        yield f"{at}.mlp.experts.down_proj", draw.matrix(EXPERTS, HIDDEN, INNER)
        yield f"{at}.mlp.experts.down_proj_bias", draw.bias(EXPERTS, HIDDEN)
    yield from draw.ends()


def deepseek_v3() -> Named:
    """Latent attention, a dense layer, then experts one by one and a shared one."""
    draw = Draw()
    for n in range(LAYERS):
        at, block = f"model.layers.{n}", f"model.layers.{n}.self_attn"
        yield f"{block}.q_a_proj.weight", draw.matrix(QUERY_RANK, HIDDEN)
        yield f"{block}.q_a_layernorm.weight", draw.norm(QUERY_RANK)
        yield f"{block}.q_b_proj.weight", draw.matrix(LATENT_HEADS * (NOPE + ROPE), QUERY_RANK)
        yield f"{block}.kv_a_proj_with_mqa.weight", draw.matrix(KEY_RANK + ROPE, HIDDEN)
        yield f"{block}.kv_a_layernorm.weight", draw.norm(KEY_RANK)
        yield f"{block}.kv_b_proj.weight", draw.matrix(LATENT_HEADS * (NOPE + VALUE), KEY_RANK)
        yield f"{block}.o_proj.weight", draw.matrix(HIDDEN, LATENT_HEADS * VALUE)
        yield from draw.layer_norms(at)
        if n == 0:
            yield from draw.mlp(f"{at}.mlp", DENSE)
            continue
        yield f"{at}.mlp.gate.weight", draw.matrix(EXPERTS, HIDDEN)
        yield f"{at}.mlp.gate.e_score_correction_bias", draw.bias(EXPERTS).float()
        for expert in range(EXPERTS):
            yield from draw.mlp(f"{at}.mlp.experts.{expert}", INNER)
        yield from draw.mlp(f"{at}.mlp.shared_experts", INNER)
    yield from draw.ends()


_COMMON: Final = {
    "hidden_size": HIDDEN, "intermediate_size": DENSE, "num_hidden_layers": LAYERS, "vocab_size": VOCABULARY,
    "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": HEAD, "num_experts_per_tok": 2,
    "max_position_embeddings": 128, "rms_norm_eps": 1e-6, "hidden_act": "silu", "attention_bias": False,
    "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "torch_dtype": "bfloat16",
}  # fmt: skip
MODELS: Final[Mapping[str, Model]] = MappingProxyType(
    {
        "qwen3_moe": Model(
            {
                **_COMMON, "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "num_experts": EXPERTS,
                "moe_intermediate_size": INNER, "decoder_sparse_step": 1, "norm_topk_prob": True, "rope_theta": 10000.0,
            },
            qwen3_moe,
            FP8,
        ),
        "gpt_oss": Model(
            {
                **_COMMON, "architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "attention_bias": True,
                "intermediate_size": INNER, "num_local_experts": EXPERTS, "sliding_window": 8, "swiglu_limit": 7.0,
                "layer_types": ["sliding_attention", "full_attention"], "rope_theta": 150000.0, "rope_scaling": YARN,
                "max_position_embeddings": 4096,
            },
            gpt_oss,
            MXFP4,
        ),
        "deepseek_v3": Model(
            {
                **_COMMON, "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3",
                "moe_intermediate_size": INNER, "n_routed_experts": EXPERTS, "n_shared_experts": 1, "n_group": 2,
                "topk_group": 1, "first_k_dense_replace": 1, "moe_layer_freq": 1, "norm_topk_prob": True,
                "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "topk_method": "noaux_tc",
                "q_lora_rank": QUERY_RANK, "kv_lora_rank": KEY_RANK, "qk_rope_head_dim": ROPE,
                "qk_nope_head_dim": NOPE, "v_head_dim": VALUE, "num_attention_heads": LATENT_HEADS,
                "num_key_value_heads": LATENT_HEADS, "num_nextn_predict_layers": 0, "rope_theta": 10000.0,
            },
            deepseek_v3,
            FP8,
        ),
    }
)  # fmt: skip
