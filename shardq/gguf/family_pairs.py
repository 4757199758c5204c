"""The keys `{arch}.*` of single architectures.

Source: llama.cpp as in llama-cpp-python 0.3.36, `set_gguf_parameters` of the class named with each function.
"""

from collections.abc import Iterable
from typing import Final

from shardq.gguf.common_pairs import add_common
from shardq.gguf.pairs import Pairs
from shardq.gguf.parameters import Parameters


def add_llama(pairs: Pairs, parameters: Parameters, blocks: int, file_type: int) -> None:
    """LlamaModel: also Mistral and Mixtral."""
    add_common(pairs, parameters, blocks, file_type)
    pairs.u32("{arch}.vocab_size", parameters.count("vocab_size"))
    pairs.u32("{arch}.rope.dimension_count", head_dimension(parameters))


def add_qwen_moe(pairs: Pairs, parameters: Parameters, blocks: int, file_type: int) -> None:
    """Qwen2MoeModel, Qwen3MoeModel."""
    add_common(pairs, parameters, blocks, file_type)
    _add_where_given(pairs, parameters, (
        ("expert_feed_forward_length", "moe_intermediate_size"),
        ("expert_shared_feed_forward_length", "shared_expert_intermediate_size"),
    ))  # fmt: skip


GEMMA2: Final = (
    ("context_length", "max_position_embeddings"), ("embedding_length", "hidden_size"), ("block_count", ""),
    ("feed_forward_length", "intermediate_size"), ("attention.head_count", "num_attention_heads"),
    ("attention.head_count_kv", "num_key_value_heads"),
)  # fmt: skip


def add_gemma2(pairs: Pairs, parameters: Parameters, blocks: int, file_type: int) -> None:
    """Gemma2Model."""
    for key, name in GEMMA2:
        pairs.u32(f"{{arch}}.{key}", parameters.count(name) if name else blocks)
    pairs.f32("{arch}.attention.layer_norm_rms_epsilon", parameters.need("rms_norm_eps"))
    pairs.u32("{arch}.attention.key_length", parameters.count("head_dim"))
    pairs.u32("{arch}.attention.value_length", parameters.count("head_dim"))
    pairs.u32("general.file_type", file_type)
    pairs.f32("{arch}.attn_logit_softcapping", parameters.need("attn_logit_softcapping"))
    pairs.f32("{arch}.final_logit_softcapping", parameters.need("final_logit_softcapping"))
    pairs.u32("{arch}.attention.sliding_window", parameters.count("sliding_window"))


def head_dimension(parameters: Parameters) -> int:
    """Columns of one head."""
    if parameters.find("head_dim") is not None:
        return parameters.count("head_dim")
    return parameters.count("hidden_size") // parameters.count("num_attention_heads")


def _add_where_given(pairs: Pairs, parameters: Parameters, rows: Iterable[tuple[str, str]]) -> None:
    for key, name in rows:
        if parameters.find(name) is not None:
            pairs.u32(f"{{arch}}.{key}", parameters.count(name))
