"""What transformers takes for granted where a config.json is silent.

llama.cpp's converter reads a config through `AutoConfig`, so that these numbers end up in its files. Here are those
that it looks at, of the model types that architectures.py has. Source: the config classes of transformers 5.23.0.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

Defaults = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class ConfigType:
    """One `model_type`."""

    defaults: Defaults
    rope: Defaults  # rope parameters where there are none at all
    aliases: Mapping[str, str]  # of a key in files: what the class calls it
    rope_theta: float = 10000.0  # beside rope parameters that have none
    partial_rotary: float | None = None
    takes_heads: bool = False  # as many key and value heads as heads, where they are null or missing
    takes_head_dim: bool = False  # hidden size over heads where the dimension is null or missing


PLAIN: Final[Defaults] = {"rope_type": "default", "rope_theta": 10000.0}
SAME: Final[Mapping[str, str]] = {}
EXPERTS: Final = {"num_experts": "num_local_experts"}
ROUTED: Final = {"num_local_experts": "n_routed_experts"}

_LLAMA: Final[Defaults] = {
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
}  # fmt: skip
_MISTRAL: Final[Defaults] = {
    **_LLAMA, "intermediate_size": 14336, "num_key_value_heads": 8, "max_position_embeddings": 131072,
    "sliding_window": 4096,
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

CONFIG_TYPES: Final[Mapping[str, ConfigType]] = {
    "llama": ConfigType(_LLAMA, PLAIN, SAME, takes_heads=True, takes_head_dim=True),
    "mistral": ConfigType(_MISTRAL, PLAIN, SAME, takes_heads=True, takes_head_dim=True),
    "mixtral": ConfigType(
        {**_MISTRAL, "sliding_window": None, "rms_norm_eps": 1e-5, "num_experts_per_tok": 2, "num_local_experts": 8},
        {**PLAIN, "rope_theta": 1000000.0}, {"num_experts": "num_local_experts"}, rope_theta=1000000.0,
        takes_heads=True,
    ),
    "qwen2": ConfigType(_QWEN2, PLAIN, SAME, takes_heads=True),
    "qwen3": ConfigType({**_QWEN2, "head_dim": 128}, PLAIN, SAME, takes_heads=True),
    "qwen2_moe": ConfigType(_QWEN2_MOE, PLAIN, SAME),
    "qwen3_moe": ConfigType(_QWEN3_MOE, PLAIN, EXPERTS),
    "gemma2": ConfigType(_GEMMA2, PLAIN, SAME),
    "phi3": ConfigType(_PHI3, PLAIN, SAME, partial_rotary=1.0, takes_heads=True),
}  # fmt: skip
