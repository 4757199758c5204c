"""Which tensors of a GGUF file get another type than its file type's own, as rows.

Source: llama.cpp as in llama-cpp-python 0.3.36, src/llama-quant.cpp: `llama_tensor_get_type_impl`,
`tensor_type_fallback`, `tensor_allows_quantization`. What only Falcon, GLM5 and BailingMoE have, and what only file
types have that shardq does not write, is not here.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal

# What tensors do: `values` are all that hold attention's values, those of fused projections among them.
Category = Literal["output", "embedding", "values", "keys", "attention_output", "widen", "down", "other"]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor is."""

    index: int  # among values; of a down projection: its block
    count: int  # of values; of blocks
    shared: bool  # keys and values serve four heads or more
    experts: int
    weighed: bool  # an imatrix is given


Condition = Callable[[Place], bool]


def more_bits(place: Place) -> bool:
    """The first and the last eighth, and each third between them: llama.cpp's `use_more_bits`."""
    eighth = place.count // 8
    return place.index < eighth or place.index >= 7 * place.count // 8 or (place.index - eighth) % 3 == 2


def first_eighth(place: Place) -> bool:
    """Early blocks."""
    return place.index < place.count // 8


@dataclass(frozen=True, slots=True)
class Rule:
    """Tensors of `category` get `type` in files of these types, where `when` holds."""

    category: Category
    file_types: tuple[str, ...]
    type: str
    when: Condition | None = None  # None: everywhere


EIGHT: Final = 8  # experts of Mixtral, which have rows of their own
OUTPUT_OF_EIGHT: Final = ("Q2_K", "Q3_K_S", "Q3_K_M", "Q4_K_S", "Q4_K_M", "IQ4_NL", "IQ4_XS")

# The first row that holds has it; without one it is the base type of the file type.
RULES: Final[tuple[Rule, ...]] = (
    Rule("embedding", ("TQ1_0", "TQ2_0"), "Q4_K"),
    Rule("values", ("Q2_K", "Q2_K_S"), "Q4_K", lambda place: place.shared),
    Rule("values", ("Q2_K",), "Q3_K"),
    Rule("values", ("Q3_K_M",), "Q5_K", lambda place: place.index < 2),
    Rule("values", ("Q3_K_M",), "Q4_K"),
    Rule("values", ("Q3_K_L",), "Q5_K"),
    Rule("values", ("Q4_K_S",), "Q5_K", lambda place: place.index < 4),
    Rule("values", ("Q4_K_M", "Q5_K_M"), "Q6_K", more_bits),
    Rule("values", ("IQ4_NL", "IQ4_XS"), "Q5_K", lambda place: place.shared),
    Rule("attention_output", OUTPUT_OF_EIGHT, "Q5_K", lambda place: place.experts == EIGHT),
    Rule("attention_output", ("Q2_K",), "Q3_K"),
    Rule("attention_output", ("Q3_K_M",), "Q4_K"),
    Rule("attention_output", ("Q3_K_L",), "Q5_K", lambda place: place.experts != EIGHT),
    Rule("down", ("Q4_0",), "Q4_1", lambda place: place.weighed and first_eighth(place)),
    Rule("down", ("Q5_0",), "Q5_1", lambda place: place.weighed and first_eighth(place)),
    Rule("down", ("Q2_K",), "Q3_K"),
    Rule("down", ("Q2_K_S",), "Q4_K", first_eighth),
    Rule("down", ("Q3_K_M",), "Q5_K", lambda place: place.index < place.count // 16),
    Rule("down", ("Q3_K_M",), "Q4_K"),
    Rule("down", ("Q3_K_L",), "Q5_K"),
    Rule("down", ("Q4_K_S",), "Q5_K", first_eighth),
    Rule("down", ("Q4_K_M", "Q5_K_M"), "Q6_K", more_bits),
    Rule("down", ("IQ4_NL", "IQ4_XS"), "Q5_K", lambda place: not place.weighed and first_eighth(place)),
)
OF_EIGHT: Final = {"values": "Q8_0", "keys": "Q8_0"}  # with eight experts, whatever the rules say
RAISED_VALUES: Final = {"Q3_K": "Q5_K", "Q4_K": "Q5_K"}  # of models that llama.cpp calls 70B

OUTPUT: Final = "output.weight"
EMBEDDINGS: Final = ("token_embd.weight", "per_layer_token_embd.weight")
# Part of a name -> what the tensor does; the first that is found counts.
PARTS: Final[tuple[tuple[str, Category], ...]] = (
    ("attn_qkv.weight", "values"),
    ("attn_kv_b.weight", "values"),
    ("attn_v.weight", "values"),
    ("attn_k.weight", "keys"),
    ("attn_q.weight", "other"),
    ("attn_output.weight", "attention_output"),
    ("ffn_up", "widen"),
    ("ffn_gate", "widen"),
    ("ffn_down", "down"),
)
# Tensors with one of these in their names stay as they are.
KEPT_PARTS: Final = (
    "_norm.weight", "ffn_gate_inp.weight", "ffn_gate_tid2eid.weight", "altup", "laurel", "per_layer_model_proj",
    "ssm_conv1d", "shortconv.conv.weight", "indexer.k_proj.weight", "indexer.q_proj.weight", "time_mix_first.weight",
    *(f"time_mix_{name}.weight" for name in ("w0", "w1", "w2", "v0", "v1", "v2", "a0", "a1", "a2", "g1", "g2")),
    "time_mix_decay_w1.weight", "time_mix_decay_w2.weight", "time_mix_lerp_fused.weight", "attn_rel_b.weight",
    ".position_embd", "sam.pos_embd", "sam.neck.", "sam.net_", ".rel_pos", ".patch_embd", ".patch_merger",
    "a.rvq.codebook", "mm.a.code_embd",
)  # fmt: skip
KEPT_NAMES: Final = ("position_embd.weight", "token_types.weight")
# What rows get that are not whole blocks; fp16 if even that has blocks too long for them.
FALLBACKS: Final = {
    "Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0",
    "IQ4_XS": "IQ4_NL", "TQ1_0": "Q4_0", "TQ2_0": "Q4_0",
}  # fmt: skip
LAST_FALLBACK: Final = "F16"


def find_category(name: str) -> Category:
    """What a tensor of this name does."""
    if name == OUTPUT:
        return "output"
    if name in EMBEDDINGS:
        return "embedding"
    return next((category for part, category in PARTS if part in name), "other")


def is_quantizable(name: str, shape: tuple[int, ...]) -> bool:
    """Matrices and stacks of them (shape in GGUF's order), but for norms and some small ones."""
    if all(size == 1 for size in shape[1:]) or not name.endswith("weight"):
        return False
    return name not in KEPT_NAMES and not any(part in name for part in KEPT_PARTS)


def find_rule(category: Category, file_type: str, place: Place) -> Rule | None:
    """The first row that holds."""
    fitting = (rule for rule in RULES if rule.category == category and file_type in rule.file_types)
    return next((rule for rule in fitting if rule.when is None or rule.when(place)), None)
