"""Tiny random models of transformers, as folders, and their own logits."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import torch
import transformers

SMALL: Final = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "head_dim": 16,
}  # fmt: skip
NEAR: Final = "sliding_attention"
MOE: Final = {"moe_intermediate_size": 32, "num_experts_per_tok": 2}
LATENT: Final = {
    "n_routed_experts": 8, "n_group": 2, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1,
    "q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16,
    "num_key_value_heads": 4,
}  # fmt: skip


def _config(name: str, **options: Any) -> Any:
    return getattr(transformers, name)(**{**SMALL, **options})


MODELS: Final[Mapping[str, Callable[[], Any]]] = {
    "llama": lambda: _config("LlamaConfig"),
    "tied": lambda: _config("LlamaConfig", tie_word_embeddings=True),
    "qwen3": lambda: _config("Qwen3Config"),
    "qwen3_moe": lambda: _config("Qwen3MoeConfig", num_experts=8, **MOE),
    "mixtral": lambda: _config("MixtralConfig", num_local_experts=4, num_experts_per_tok=2),
    "gemma3": lambda: _config("Gemma3TextConfig", sliding_window=8, layer_types=[NEAR, "full_attention", NEAR]),
    "deepseek_v3": lambda: _config("DeepseekV3Config", **MOE, **LATENT),
    "gpt_oss": lambda: _config("GptOssConfig", num_local_experts=4, num_experts_per_tok=2, sliding_window=8),
    "phi3": lambda: _config("Phi3Config", pad_token_id=0),
}  # fmt: skip


def make_model(name: str, folder: Path, dtype: torch.dtype = torch.bfloat16, **saving: Any) -> Path:
    """Write a model with random weights, norms and biases included."""
    config = MODELS[name]()
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.05)
        for n, b in model.named_buffers():
            if "correction" in n:
                b.add_(torch.randn_like(b) * 0.05)
    model.save_pretrained(folder, **saving)
    return folder


def whole_logits(folder: Path, ids: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Of the whole model, loaded by transformers."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager")
    with torch.no_grad():
        found: torch.Tensor = model.eval()(ids, use_cache=False).logits
    return found


def some_ids(samples: int = 2, tokens: int = 24, vocabulary: int = 96) -> torch.Tensor:
    """The same for every call."""
    return torch.randint(0, vocabulary, (samples, tokens), generator=torch.Generator().manual_seed(1))
