"""The keys `{arch}.*` of single architectures.

Source: llama.cpp as in llama-cpp-python 0.3.36, `set_gguf_parameters` of the class named with each function.
"""

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Final

from shardq.errors import UnsupportedSource
from shardq.gguf.common_pairs import add_common, add_gating
from shardq.gguf.config_defaults import FULL_EVERY
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


LINEAR: Final = (
    ("conv_kernel", "linear_conv_kernel_dim"), ("state_size", "linear_key_head_dim"),
    ("group_count", "linear_num_key_heads"), ("time_step_rank", "linear_num_value_heads"),
)  # fmt: skip
SECTIONS: Final = (11, 11, 10, 0)  # of Qwen 3.5's rope, where its config has none


def add_qwen_next(pairs: Pairs, parameters: Parameters, blocks: int, file_type: int) -> None:
    """Qwen3NextModel: layers of linear attention, and of those that predict further tokens how many there are."""
    add_qwen_moe(pairs, parameters, blocks, file_type)
    if further := blocks - parameters.blocks:
        pairs.u32("{arch}.nextn_predict_layers", further)
    for key, name in LINEAR:
        pairs.u32(f"{{arch}}.ssm.{key}", parameters.count(name))
    inner = parameters.count("linear_value_head_dim") * parameters.count("linear_num_value_heads")
    pairs.u32("{arch}.ssm.inner_size", inner)
    if (layers := parameters.find("layer_types")) is not None:
        if len(layers) != parameters.blocks:
            raise UnsupportedSource(
                f"config.json: layer_types has {len(layers)} entries, expected one for each of {parameters.blocks}"
            )
        linear = [layer == "linear_attention" for layer in layers]
        pairs.array("{arch}.attention.recurrent_layers", [*linear, *(blocks - len(layers)) * [False]])
    pairs.u32("{arch}.full_attention_interval", parameters.values.get("full_attention_interval", FULL_EVERY))
    part = parameters.rope.get("partial_rotary_factor", 0.25)
    pairs.u32("{arch}.rope.dimension_count", int(head_dimension(parameters) * part))


def add_qwen35(pairs: Pairs, parameters: Parameters, blocks: int, file_type: int) -> None:
    """Qwen3_5TextModel, Qwen3_5MoeTextModel."""
    add_qwen_next(pairs, parameters, blocks, file_type)
    if "mrope_section" not in parameters.rope:
        pairs.array("{arch}.rope.dimension_sections", SECTIONS)


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


GEMMA3: Final = (
    ("context_length", "max_position_embeddings", 131072), ("attention.head_count", "num_attention_heads", 8),
    ("attention.key_length", "head_dim", 256), ("attention.value_length", "head_dim", 256),
    ("attention.head_count_kv", "num_key_value_heads", 4),
)  # fmt: skip


def add_gemma3(pairs: Pairs, parameters: Parameters, blocks: int, file_type: int) -> None:
    """Gemma3Model: with numbers of its own for what a config leaves out."""
    add_common(pairs, parameters, blocks, file_type)
    for key, name, default in GEMMA3:
        pairs.u32(f"{{arch}}.{key}", parameters.values.get(name, default))
    pairs.f32("{arch}.attention.layer_norm_rms_epsilon", parameters.values.get("rms_norm_eps", 1e-6))
    pairs.f32("{arch}.rope.freq_base", parameters.full_rope.get("rope_theta", 1000000.0))
    if cap := parameters.find("final_logit_softcapping"):
        pairs.f32("{arch}.final_logit_softcapping", cap)
    if parameters.find("sliding_window_pattern") != 1:
        pairs.u32("{arch}.attention.sliding_window", parameters.count("sliding_window"))


def add_phi3(pairs: Pairs, parameters: Parameters, blocks: int, file_type: int) -> None:
    """Phi3MiniModel. A window of 0 says that there is none. How far a long rope is stretched is written with its
    factors, before everything else: see `add_phi3_stretch`."""
    if (kind := parameters.rope.get("rope_type")) not in ("default", "longrope"):
        raise UnsupportedSource(f"config.json: rope type {kind!a}; Phi 3 has default and longrope")
    pairs.u32("{arch}.context_length", parameters.count("n_positions", "max_position_embeddings"))
    pairs.u32("{arch}.rope.scaling.original_context_length", original_context(parameters))
    pairs.u32("{arch}.embedding_length", parameters.count("hidden_size", "n_embd"))
    pairs.u32("{arch}.feed_forward_length", parameters.count("intermediate_size"))
    pairs.u32("{arch}.block_count", blocks)
    pairs.u32("{arch}.attention.head_count", parameters.count("num_attention_heads", "n_head"))
    pairs.u32("{arch}.attention.head_count_kv", parameters.count("num_key_value_heads", "n_head_kv"))
    pairs.f32("{arch}.attention.layer_norm_rms_epsilon", parameters.need("rms_norm_eps"))
    pairs.u32("{arch}.rope.dimension_count", rotary_dimensions(parameters))
    pairs.f32("{arch}.rope.freq_base", parameters.full_rope.get("rope_theta"))
    pairs.u32("general.file_type", file_type)
    pairs.u32("{arch}.attention.sliding_window", parameters.find("sliding_window") or 0)


def add_phi3_stretch(pairs: Pairs, parameters: Parameters) -> None:
    """What attention is multiplied by where a rope has factors for long texts: sqrt(1 + ln(s) / ln(c)), c the context
    of pretraining, s how many times longer it is now; `Phi3MiniModel.generate_extra_tensors`."""
    if not parameters.rope.get("long_factor"):
        return
    original = original_context(parameters)
    scale = parameters.count("n_positions", "max_position_embeddings") / original
    factor = math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0
    pairs.f32("{arch}.rope.scaling.attn_factor", factor)


def original_context(parameters: Parameters) -> int:
    """The context of pretraining, before rope was stretched. Raises UnsupportedSource."""
    found = parameters.rope.get("original_max_position_embeddings")
    if not isinstance(found, int):
        raise UnsupportedSource(
            f"config.json: original_max_position_embeddings is {found!a}, expected the context of pretraining"
        )
    return found


def rotary_dimensions(parameters: Parameters) -> int:
    """Phi 3's columns of a head that rotate."""
    part = parameters.rope.get("partial_rotary_factor", 1.0)
    return int(part * parameters.count("hidden_size", "n_embd")) // parameters.count("num_attention_heads", "n_head")


def add_deepseek2(pairs: Pairs, parameters: Parameters, blocks: int, file_type: int) -> None:
    """DeepseekV2Model: attention over latent vectors is written as what it is once absorbed, one key for all heads."""
    values = {"rms_norm_eps": 1e-6, **parameters.values, "num_key_value_heads": 1}
    add_common(pairs, replace(parameters, values=values), blocks, file_type)
    experts = parameters.find("n_routed_experts")
    dense = parameters.find("first_k_dense_replace")
    pairs.u32("{arch}.leading_dense_block_count", dense if dense is not None else 0 if experts else blocks)
    pairs.u32("{arch}.vocab_size", parameters.count("vocab_size"))
    _add_where_given(pairs, parameters, (("attention.q_lora_rank", "q_lora_rank"),))
    latent, turned = parameters.values.get("kv_lora_rank", 512), parameters.count("qk_rope_head_dim")
    pairs.u32("{arch}.attention.kv_lora_rank", latent)
    pairs.u32("{arch}.attention.key_length", latent + turned)
    pairs.u32("{arch}.attention.value_length", latent)
    pairs.u32("{arch}.attention.key_length_mla", parameters.count("qk_nope_head_dim") + turned)
    pairs.u32("{arch}.attention.value_length_mla", parameters.count("v_head_dim"))
    pairs.u32("{arch}.expert_feed_forward_length", parameters.count("moe_intermediate_size", "intermediate_size"))
    _add_where_given(pairs, parameters, (("expert_count", "n_routed_experts"),))
    pairs.u32("{arch}.expert_shared_count", parameters.find("n_shared_experts") or 0)
    if (scale := parameters.find("routed_scaling_factor")) is not None:
        pairs.f32("{arch}.expert_weights_scale", scale)
    if parameters.find("norm_topk_prob"):
        pairs.flag("{arch}.expert_weights_norm", True)
    pairs.u32("{arch}.rope.dimension_count", turned)
    if (all_dimensions := parameters.rope.get("mscale_all_dim")) is not None:
        pairs.f32("{arch}.rope.scaling.yarn_log_multiplier", 0.1 * all_dimensions)


def add_glm4_moe(pairs: Pairs, parameters: Parameters, blocks: int, file_type: int) -> None:
    """Glm4MoeModel."""
    add_common(pairs, parameters, blocks, file_type)
    part = parameters.rope.get("partial_rotary_factor", 0.5)
    pairs.u32("{arch}.rope.dimension_count", int(head_dimension(parameters) * part))
    _add_where_given(pairs, parameters, (
        ("expert_count", "n_routed_experts"), ("expert_feed_forward_length", "moe_intermediate_size"),
        ("expert_shared_count", "n_shared_experts"), ("leading_dense_block_count", "first_k_dense_replace"),
    ))  # fmt: skip
    add_gating(pairs, "sigmoid")
    if (scale := parameters.find("routed_scaling_factor")) is not None:
        pairs.f32("{arch}.expert_weights_scale", scale)
    if (norm := parameters.find("norm_topk_prob")) is not None:
        pairs.flag("{arch}.expert_weights_norm", norm)
    _add_where_given(pairs, parameters, (("nextn_predict_layers", "num_nextn_predict_layers"),))


def add_minimax_m2(pairs: Pairs, parameters: Parameters, blocks: int, file_type: int) -> None:
    """MiniMaxM2Model."""
    add_common(pairs, parameters, blocks, file_type)
    pairs.u32("{arch}.expert_feed_forward_length", parameters.count("intermediate_size"))
    pairs.u32("{arch}.rope.dimension_count", parameters.count("rotary_dim"))


def add_gpt_oss(pairs: Pairs, parameters: Parameters, blocks: int, file_type: int) -> None:
    """GptOssModel."""
    add_common(pairs, parameters, blocks, file_type)
    pairs.u32("{arch}.attention.sliding_window", parameters.count("sliding_window"))
    pairs.u32("{arch}.expert_feed_forward_length", parameters.count("intermediate_size"))


def head_dimension(parameters: Parameters) -> int:
    """Columns of one head."""
    if parameters.find("head_dim") is not None:
        return parameters.count("head_dim")
    return parameters.count("hidden_size") // parameters.count("num_attention_heads")


def _add_where_given(pairs: Pairs, parameters: Parameters, rows: Iterable[tuple[str, str]]) -> None:
    for key, name in rows:
        if parameters.find(name) is not None:
            pairs.u32(f"{{arch}}.{key}", parameters.count(name))
