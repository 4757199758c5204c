"""Which tensors of a llama.cpp imatrix have the input of a module.

Source: gguf 0.19.0, `get_tensor_name_map`. llama.cpp permutes rows of q and k, stacks experts, and splits kv_b, but it
moves no columns of what is in the table: a vector of inputs holds for the module as it is.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class Wanted:
    """Where an imatrix may have the input of a module: any of `tensors`, the best first."""

    tensors: tuple[str, ...]
    expert: int | None = None  # slice of a stack
    shared: bool = False  # all experts get the same input, so that one that no token has reached can borrow
    averaged: tuple[str, ...] = ()  # stand-ins: the mean of their slices


_LAYER: Final = re.compile(r"(?:model\.)?(?:language_model\.)?(?:model\.)?layers\.(\d{1,6})\.(.+)")
_EXPERT: Final = re.compile(r"(?:mlp|block_sparse_moe)\.experts\.(\d{1,6})\.(\w+)")
# Modules of a layer -> tensors with the same input: the module's own, then those beside it.
_DENSE: Final[Mapping[str, tuple[str, ...]]] = {
    "self_attn.q_proj": ("attn_q", "attn_k", "attn_v", "attn_qkv", "attn_kv_a_mqa"),
    "self_attn.k_proj": ("attn_k", "attn_q", "attn_v", "attn_qkv"),
    "self_attn.v_proj": ("attn_v", "attn_q", "attn_k", "attn_qkv"),
    "self_attn.qkv_proj": ("attn_qkv", "attn_q", "attn_k", "attn_v"),
    "self_attn.o_proj": ("attn_output",),
    "self_attn.q_a_proj": ("attn_q_a", "attn_kv_a_mqa"),
    "self_attn.q_b_proj": ("attn_q_b",),
    "self_attn.kv_a_proj_with_mqa": ("attn_kv_a_mqa", "attn_q_a", "attn_q"),
    "self_attn.kv_b_proj": ("attn_kv_b",),
    "mlp.gate_proj": ("ffn_gate", "ffn_up"),
    "mlp.up_proj": ("ffn_up", "ffn_gate"),
    "mlp.gate_up_proj": ("ffn_up", "ffn_gate"),
    "mlp.down_proj": ("ffn_down",),
    "mlp.shared_expert.gate_proj": ("ffn_gate_shexp", "ffn_up_shexp"),
    "mlp.shared_expert.up_proj": ("ffn_up_shexp", "ffn_gate_shexp"),
    "mlp.shared_expert.down_proj": ("ffn_down_shexp",),
    "mlp.shared_experts.gate_proj": ("ffn_gate_shexp", "ffn_up_shexp"),
    "mlp.shared_experts.up_proj": ("ffn_up_shexp", "ffn_gate_shexp"),
    "mlp.shared_experts.down_proj": ("ffn_down_shexp",),
}
# Newer conversions have no kv_b: its value part sees latents that attention has averaged, one slice for each head.
_AVERAGED: Final[Mapping[str, tuple[str, ...]]] = {"self_attn.kv_b_proj": ("attn_v_b",)}
# Projections of an expert -> stacks, and whether all experts get the same input.
_EXPERTS: Final[Mapping[str, tuple[tuple[str, ...], bool]]] = {
    "gate_proj": (("ffn_gate_exps", "ffn_gate_up_exps", "ffn_up_exps"), True),
    "w1": (("ffn_gate_exps", "ffn_gate_up_exps", "ffn_up_exps"), True),
    "up_proj": (("ffn_up_exps", "ffn_gate_up_exps", "ffn_gate_exps"), True),
    "w3": (("ffn_up_exps", "ffn_gate_up_exps", "ffn_gate_exps"), True),
    "down_proj": (("ffn_down_exps",), False),
    "w2": (("ffn_down_exps",), False),
}
_GLOBAL: Final[Mapping[str, tuple[str, ...]]] = {"lm_head": ("output.weight",)}


def find_wanted(module: str) -> Wanted | None:
    """Where an imatrix has a module's input; None for a module that is not in the table.

    The table covers the names of llama, mistral, mixtral, qwen2, qwen3 and their MoE forms, gemma, phi3, deepseek2 and
    whoever else has the same.
    """
    if module in _GLOBAL:
        return Wanted(_GLOBAL[module])
    layer = _LAYER.fullmatch(module)
    if layer is None:
        return None
    number, inner = int(layer[1]), layer[2]
    if (dense := _DENSE.get(inner)) is not None:
        return Wanted(_tensors(number, dense), averaged=_tensors(number, _AVERAGED.get(inner, ())))
    expert = _EXPERT.fullmatch(inner)
    if expert is None or expert[2] not in _EXPERTS:
        return None
    stacks, shared = _EXPERTS[expert[2]]
    return Wanted(_tensors(number, stacks), int(expert[1]), shared)


def _tensors(layer: int, stems: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"blk.{layer}.{stem}.weight" for stem in stems)
