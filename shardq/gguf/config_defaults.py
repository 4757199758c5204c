"""What transformers takes for granted where a config.json is silent.

llama.cpp's converter reads a config through `AutoConfig`, so that these numbers end up in its files. Here are those
that it looks at, of the model types that architectures.py has. Source: the config classes of transformers 5.23.0.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

Defaults = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class ConfigType:
    """One `model_type`."""

    defaults: Defaults
    aliases: Mapping[str, str] = field(default_factory=dict)  # of a key in files: what the class calls it
    rope: Defaults = field(default_factory=dict)  # rope parameters where there are none
    rope_theta: float = 10000.0  # beside rope parameters that have none
    partial_rotary: float | None = None
    takes_heads: bool = False  # as many key and value heads as heads, where they are null or missing
    head_dim_key: str = ""  # the head dimension is this one's
    renames: Mapping[str, str] = field(default_factory=dict)  # of rope types
    by_layer: bool = False  # a rope of its own for layers with a window
    takes_head_dim: bool = False  # hidden size over heads where the dimension is null or missing
    linear: bool = False  # layers of linear attention but every so many, where their types are null or missing


FULL_EVERY: Final = 4  # layer that has no linear attention
EXPERTS: Final = {"num_experts": "num_local_experts"}
ROUTED: Final = {"num_local_experts": "n_routed_experts", "num_mtp_layers": "num_nextn_predict_layers"}

_LLAMA: Final[Defaults] = {
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
}  # fmt: skip
_MISTRAL: Final[Defaults] = {
    **_LLAMA, "intermediate_size": 14336, "num_key_value_heads": 8, "max_position_embeddings": 131072,
    "sliding_window": 4096,
}  # fmt: skip
_MIXTRAL: Final[Defaults] = {
    **_MISTRAL, "sliding_window": None, "rms_norm_eps": 1e-5, "num_experts_per_tok": 2, "num_local_experts": 8,
}  # fmt: skip
_QWEN2: Final[Defaults] = {
    **_LLAMA, "vocab_size": 151936, "intermediate_size": 22016, "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
}  # fmt: skip
_QWEN2_MOE: Final[Defaults] = {
    **_QWEN2, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 24, "num_attention_heads": 16,
    "num_key_value_heads": 16, "moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632,
    "num_experts_per_tok": 4, "num_experts": 60,
}  # fmt: skip
_QWEN3_MOE: Final[Defaults] = {
    **_QWEN2, "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 24, "num_key_value_heads": 4,
    "moe_intermediate_size": 768, "num_experts_per_tok": 8, "num_local_experts": 128,
}  # fmt: skip
_LINEAR: Final[Defaults] = {
    "num_attention_heads": 16, "max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
    "head_dim": 256, "linear_conv_kernel_dim": 4, "linear_key_head_dim": 128, "linear_value_head_dim": 128,
    "linear_num_key_heads": 16, "linear_num_value_heads": 32,
}  # fmt: skip
_QWEN3_NEXT: Final[Defaults] = {
    **_LINEAR, "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 48,
    "num_key_value_heads": 2, "moe_intermediate_size": 512, "shared_expert_intermediate_size": 512,
    "num_experts_per_tok": 10, "num_experts": 512,
}  # fmt: skip
_QWEN3_5: Final[Defaults] = {
    **_LINEAR, "vocab_size": 248320, "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 32,
    "num_key_value_heads": 4,
}  # fmt: skip
_QWEN3_5_MOE: Final[Defaults] = {
    **_LINEAR, "vocab_size": 248320, "hidden_size": 2048, "num_hidden_layers": 40, "num_key_value_heads": 2,
    "moe_intermediate_size": 512, "shared_expert_intermediate_size": 512, "num_experts_per_tok": 8, "num_experts": 256,
}  # fmt: skip
_GEMMA2: Final[Defaults] = {
    "vocab_size": 256000, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6, "tie_word_embeddings": True, "sliding_window": 4096, "final_logit_softcapping": 30.0,
    "attn_logit_softcapping": 50.0,
}  # fmt: skip
_PHI3: Final[Defaults] = {
    **_LLAMA, "vocab_size": 32064, "hidden_size": 3072, "intermediate_size": 8192, "max_position_embeddings": 4096,
    "original_max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
}  # fmt: skip

_GEMMA3: Final[Defaults] = {
    **_GEMMA2, "vocab_size": 262208, "max_position_embeddings": 131072, "final_logit_softcapping": None,
    "attn_logit_softcapping": None,
}  # fmt: skip
_DEEPSEEK_V2: Final[Defaults] = {
    **_LLAMA, "vocab_size": 102400, "num_key_value_heads": None, "first_k_dense_replace": 0, "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "n_routed_experts": 64, "n_shared_experts": 2, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
    "routed_scaling_factor": 1.0, "norm_topk_prob": False, "v_head_dim": 128, "moe_intermediate_size": 1407,
}  # fmt: skip
_DEEPSEEK_V3: Final[Defaults] = {
    **_DEEPSEEK_V2, "vocab_size": 129280, "hidden_size": 7168, "intermediate_size": 18432, "num_hidden_layers": 61,
    "num_attention_heads": 128, "num_key_value_heads": 128, "max_position_embeddings": 4096, "n_routed_experts": 256,
    "n_shared_experts": 1, "moe_intermediate_size": 2048, "routed_scaling_factor": 2.5, "n_group": 8, "topk_group": 4,
    "num_experts_per_tok": 8, "first_k_dense_replace": 3, "norm_topk_prob": True, "num_nextn_predict_layers": 1,
}  # fmt: skip
_GLM4_MOE: Final[Defaults] = {
    **_LLAMA, "vocab_size": 151552, "intermediate_size": 10944, "num_hidden_layers": 46, "num_attention_heads": 96,
    "num_key_value_heads": 8, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "moe_intermediate_size": 1408,
    "num_experts_per_tok": 8, "n_shared_experts": 1, "n_routed_experts": 128, "routed_scaling_factor": 1.0,
    "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "norm_topk_prob": True, "num_nextn_predict_layers": 1,
}  # fmt: skip
_MINIMAX_M2: Final[Defaults] = {
    **_LLAMA, "vocab_size": 200064, "hidden_size": 3072, "intermediate_size": 1536, "num_hidden_layers": 62,
    "num_attention_heads": 48, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 196608,
    "num_experts_per_tok": 8, "num_local_experts": 256,
}  # fmt: skip
_GPT_OSS: Final[Defaults] = {
    "num_hidden_layers": 36, "num_local_experts": 128, "vocab_size": 201088, "hidden_size": 2880,
    "intermediate_size": 2880, "head_dim": 64, "num_attention_heads": 64, "num_key_value_heads": 8,
    "sliding_window": 128, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "num_experts_per_tok": 4,
}  # fmt: skip
_OSS_ROPE: Final[Defaults] = {
    "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
    "original_max_position_embeddings": 4096,
}  # fmt: skip

CONFIG_TYPES: Final[Mapping[str, ConfigType]] = {
    "llama": ConfigType(_LLAMA, takes_heads=True, takes_head_dim=True),
    "mistral": ConfigType(_MISTRAL, takes_head_dim=True),
    "mixtral": ConfigType(_MIXTRAL, EXPERTS, rope_theta=1000000.0),
    "qwen2": ConfigType(_QWEN2, takes_heads=True),
    "qwen3": ConfigType({**_QWEN2, "head_dim": 128}, takes_heads=True),
    "qwen2_moe": ConfigType(_QWEN2_MOE),
    "qwen3_moe": ConfigType(_QWEN3_MOE, EXPERTS),
    "qwen3_next": ConfigType(_QWEN3_NEXT, partial_rotary=0.25, linear=True),
    "qwen3_5_text": ConfigType(_QWEN3_5, partial_rotary=0.25, linear=True),
    "qwen3_5_moe_text": ConfigType(_QWEN3_5_MOE, partial_rotary=0.25, linear=True),
    "gemma2": ConfigType(_GEMMA2),
    "gemma3_text": ConfigType(_GEMMA3, by_layer=True),
    "phi3": ConfigType(_PHI3, partial_rotary=1.0, takes_heads=True, renames={"su": "longrope", "yarn": "longrope"}),
    "deepseek_v2": ConfigType(
        _DEEPSEEK_V2, {"num_experts": "n_routed_experts"}, takes_heads=True, head_dim_key="qk_rope_head_dim"
    ),
    "deepseek_v3": ConfigType(_DEEPSEEK_V3, ROUTED, takes_heads=True, head_dim_key="qk_rope_head_dim"),
    "glm4_moe": ConfigType(_GLM4_MOE, ROUTED, partial_rotary=0.5),
    "minimax_m2": ConfigType(_MINIMAX_M2, EXPERTS, rope_theta=5000000.0),
    "gpt_oss": ConfigType(_GPT_OSS, EXPERTS, _OSS_ROPE, rope_theta=150000.0),
}
