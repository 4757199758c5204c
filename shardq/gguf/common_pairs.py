"""The keys `{arch}.*` that most architectures share, from the parameters alone.

Source: llama.cpp as in llama-cpp-python 0.3.36, `TextModel.set_gguf_parameters`: names, order, types, and which key of
a config counts where several could.
"""

from collections.abc import Mapping
from typing import Any, Final

from shardq.errors import UnsupportedSource
from shardq.gguf.pairs import Pairs
from shardq.gguf.parameters import Parameters

SHAPES: Final = (  # key, and its names in configs
    ("context_length", (
        "max_position_embeddings", "n_ctx", "n_positions", "max_length", "max_sequence_length", "model_max_length",
    )),
    ("embedding_length", ("hidden_size", "n_embd", "dim")),
    ("feed_forward_length", (
        "prefix_dense_intermediate_size", "dense_intermediate_size", "intermediate_size", "n_inner", "hidden_dim",
    )),
    ("attention.head_count", ("num_attention_heads", "n_head", "n_heads")),
    ("attention.head_count_kv", ("num_key_value_heads", "n_kv_heads")),
)  # fmt: skip
EPSILONS: Final = (
    ("attention.layer_norm_rms_epsilon", ("rms_norm_eps", "norm_eps")),
    ("attention.layer_norm_epsilon", ("layer_norm_eps", "layer_norm_epsilon", "norm_epsilon")),
)
EXPERTS: Final = (
    ("expert_count", ("num_local_experts", "num_experts", "n_routed_experts")),
    ("expert_used_count", ("num_experts_per_tok", "num_experts_per_token", "top_k_experts")),
    ("expert_group_count", ("n_group",)),
    ("expert_group_used_count", ("topk_group",)),
)
SCORES: Final = (
    "score_function", "scoring_func", "score_func", "moe_router_activation", "moe_router_activation_func",
    "expert_selection_fn",
)  # fmt: skip
GATING: Final = {"softmax": 1, "sigmoid": 2, "sqrtsoftplus": 4}
YARN: Final = (
    ("yarn_ext_factor", ("extrapolation_factor",)),
    ("yarn_attn_factor", ("attention_factor", "attn_factor")),
    ("yarn_beta_fast", ("beta_fast",)),
    ("yarn_beta_slow", ("beta_slow",)),
)
UNSCALED: Final = ("default", "dynamic", "llama3")  # llama3 is a tensor of factors


def add_common(pairs: Pairs, parameters: Parameters, blocks: int, file_type: int) -> None:
    """Add them in order. `blocks` counts those for predicting further tokens, where they are kept.

    Raises UnsupportedSource.
    """
    pairs.u32("{arch}.block_count", blocks)
    _add_counts(pairs, parameters, SHAPES)
    if parameters.values.get("is_causal") is False:
        pairs.flag("{arch}.attention.causal", False)
    _add_rope(pairs, parameters)
    for key, names in EPSILONS:
        if (value := parameters.find(*names)) is not None:
            pairs.f32(f"{{arch}}.{key}", value)
    _add_counts(pairs, parameters, EXPERTS)
    if (score := parameters.find(*SCORES)) is not None:
        add_gating(pairs, score)
    if (head_dim := parameters.find("head_dim")) is not None:
        pairs.u32("{arch}.attention.key_length", head_dim)
        pairs.u32("{arch}.attention.value_length", head_dim)
    pairs.u32("general.file_type", file_type)


def add_gating(pairs: Pairs, score: str) -> None:
    """How the router's numbers become weights. Raises UnsupportedSource."""
    if score not in GATING:
        raise UnsupportedSource(f"config.json: the router's function is {score!a}; GGUF knows {', '.join(GATING)}")
    pairs.u32("{arch}.expert_gating_func", GATING[score])


def _add_counts(pairs: Pairs, parameters: Parameters, rows: tuple[tuple[str, tuple[str, ...]], ...]) -> None:
    for key, names in rows:
        value = parameters.find(*names)
        if isinstance(value, list):
            pairs.array(f"{{arch}}.{key}", value)
        elif value is not None:
            pairs.u32(f"{{arch}}.{key}", parameters.count(*names))


def _add_rope(pairs: Pairs, parameters: Parameters) -> None:
    rope = parameters.full_rope
    _add_scaling(pairs, rope)
    if sections := parameters.rope.get("mrope_section"):
        pairs.array("{arch}.rope.dimension_sections", [*sections, 0, 0, 0, 0][:4])
    if (theta := rope.get("rope_theta")) is not None:
        pairs.f32("{arch}.rope.freq_base", theta)
    local = parameters.rope.get("sliding_attention", {}).get("rope_theta")
    if local is not None:
        pairs.f32("{arch}.rope.freq_base_swa", local)


def _add_scaling(pairs: Pairs, rope: Mapping[str, Any]) -> None:
    kind, factor = rope.get("rope_type"), rope.get("factor")
    if kind is None or str(kind).lower() in UNSCALED:
        return
    if kind in ("su", "longrope"):
        pairs.text("{arch}.rope.scaling.type", "longrope")
    elif kind == "linear" and factor is not None:
        pairs.text("{arch}.rope.scaling.type", "linear")
        pairs.f32("{arch}.rope.scaling.factor", factor)
    elif kind == "yarn" and factor is not None:
        pairs.text("{arch}.rope.scaling.type", "yarn")
        pairs.f32("{arch}.rope.scaling.factor", factor)
        pairs.u32("{arch}.rope.scaling.original_context_length", rope.get("original_max_position_embeddings"))
        for key, names in YARN:
            value = next((rope[name] for name in names if name in rope), None)
            if value is not None:
                pairs.f32(f"{{arch}}.rope.scaling.{key}", value)
    else:  # the converter warns and leaves it out, and the model is another one then
        raise UnsupportedSource(f"config.json: rope type {str(kind)!a} with factor {factor} has no form in GGUF")
