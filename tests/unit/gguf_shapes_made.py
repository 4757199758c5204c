"""Names and shapes of the tensors of tiny checkpoints, as real architectures have them."""

from collections.abc import Callable
from typing import Any

BPE_TOKENS, PIECES = 300, 320  # of the tokenizers in golden_gguf_model
Shapes = dict[str, tuple[int, ...]]


def attention(
    block: str, head: int = 16, heads: int = 4, kv: int = 2, bias: bool = False, norms: bool = False
) -> Shapes:
    rows = {"q_proj": heads * head, "k_proj": kv * head, "v_proj": kv * head}
    found: Shapes = {f"{block}.self_attn.{name}.weight": (count, 64) for name, count in rows.items()}
    found[f"{block}.self_attn.o_proj.weight"] = (64, heads * head)
    if bias:
        found |= {f"{block}.self_attn.{name}.bias": (count,) for name, count in rows.items()}
    if norms:
        found |= {f"{block}.self_attn.{name}.weight": (head,) for name in ("q_norm", "k_norm")}
    return found


def mlp(parent: str, size: int = 96, names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")) -> Shapes:
    gate, up, down = names
    return {
        f"{parent}.{gate}.weight": (size, 64),
        f"{parent}.{up}.weight": (size, 64),
        f"{parent}.{down}.weight": (64, size),
    }


def experts(
    parent: str, count: int = 4, size: int = 32, names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
) -> Shapes:
    return {key: shape for i in range(count) for key, shape in mlp(f"{parent}.experts.{i}", size, names).items()}


def norms(block: str, *more: str) -> Shapes:
    return {f"{block}.{name}.weight": (64,) for name in ("input_layernorm", "post_attention_layernorm", *more)}


def ends(tokens: int, head: bool = True) -> Shapes:
    found: Shapes = {"model.embed_tokens.weight": (tokens, 64), "model.norm.weight": (64,)}
    return found | ({"lm_head.weight": (tokens, 64)} if head else {})


def blocks(count: int = 2) -> list[str]:
    return [f"model.layers.{i}" for i in range(count)]


def joined(*parts: Shapes) -> Shapes:
    return {name: shape for part in parts for name, shape in part.items()}


def dense(tokens: int, tied: bool = False, **attn: Any) -> Shapes:
    return joined(ends(tokens, not tied), *(joined(attention(b, **attn), mlp(f"{b}.mlp"), norms(b)) for b in blocks()))


def qwen_moe(block: str, shared: int = 0, **attn: Any) -> Shapes:
    found = joined(
        attention(block, **attn), experts(f"{block}.mlp"), norms(block), {f"{block}.mlp.gate.weight": (4, 64)}
    )
    if shared:
        found |= mlp(f"{block}.mlp.shared_expert", shared) | {f"{block}.mlp.shared_expert_gate.weight": (1, 64)}
    return found


def linear(block: str, joint: bool, keys: int = 2, values: int = 4, key: int = 12, value: int = 16) -> Shapes:
    """Linear attention; `joint`: its projections as Qwen 3 Next has them."""
    name, mixed = f"{block}.linear_attn", 2 * keys * key + values * value
    rows = {"qkv": mixed, "z": values * value, "b": values, "a": values}
    if joint:
        rows = {"qkvz": mixed + values * value, "ba": 2 * values}
    found: Shapes = {f"{name}.in_proj_{part}.weight": (count, 64) for part, count in rows.items()}
    return found | {
        f"{name}.conv1d.weight": (mixed, 1, 4), f"{name}.A_log": (values,), f"{name}.dt_bias": (values,),
        f"{name}.norm.weight": (value,), f"{name}.out_proj.weight": (64, values * value),
    }  # fmt: skip


def gated_delta(inside: Callable[[str], Shapes], joint: bool = False, head: bool = True) -> Shapes:
    """Qwen's layer of linear attention, one of full attention whose queries have gates, and one for further tokens."""
    first, second = blocks()
    full = (second, "mtp.layers.0")
    found = joined(ends(BPE_TOKENS, head), linear(first, joint), *(joined(norms(b), inside(b)) for b in (first, *full)))
    for block in full:
        found |= attention(block, norms=True) | {f"{block}.self_attn.q_proj.weight": (128, 64)}
    found |= {f"mtp.{name}.weight": (64,) for name in ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden")}
    return found | {"mtp.fc.weight": (64, 128)}


def qwen_dense(block: str) -> Shapes:
    return mlp(f"{block}.mlp")


def qwen_single(block: str) -> Shapes:
    """Experts and one that all share, with their routers."""
    return experts(f"{block}.mlp") | _shared(block)


def qwen_fused(block: str) -> Shapes:
    """The same as Qwen 3.5 has them: in stacks, but those of the layer for further tokens."""
    if block.startswith("mtp"):
        return experts(f"{block}.mlp", size=96) | _shared(block)
    stacks: Shapes = {"gate_up_proj": (4, 192, 64), "down_proj": (4, 64, 96)}
    return {f"{block}.mlp.experts.{name}": shape for name, shape in stacks.items()} | _shared(block)


def _shared(block: str) -> Shapes:
    routers = {f"{block}.mlp.gate.weight": (4, 64), f"{block}.mlp.shared_expert_gate.weight": (1, 64)}
    return mlp(f"{block}.mlp.shared_expert", 48) | routers


def mla(block: str, q_lora: int) -> Shapes:
    found: Shapes = {
        f"{block}.self_attn.kv_a_proj_with_mqa.weight": (40, 64), f"{block}.self_attn.kv_a_layernorm.weight": (32,),
        f"{block}.self_attn.kv_b_proj.weight": (4 * 28, 32), f"{block}.self_attn.o_proj.weight": (64, 48),
    }  # fmt: skip
    if not q_lora:
        return found | {f"{block}.self_attn.q_proj.weight": (96, 64)}
    return found | {
        f"{block}.self_attn.q_a_proj.weight": (q_lora, 64), f"{block}.self_attn.q_a_layernorm.weight": (q_lora,),
        f"{block}.self_attn.q_b_proj.weight": (96, q_lora),
    }  # fmt: skip


def deepseek(q_lora: int, bias: bool) -> Shapes:
    first, second = blocks()
    found = joined(
        ends(BPE_TOKENS), mla(first, q_lora), mlp(f"{first}.mlp"), norms(first), mla(second, q_lora), norms(second)
    )
    found |= joined(
        experts(f"{second}.mlp"), mlp(f"{second}.mlp.shared_experts", 32), {f"{second}.mlp.gate.weight": (4, 64)}
    )
    return found | ({f"{second}.mlp.gate.e_score_correction_bias": (4,)} if bias else {})


def glm4_moe() -> Shapes:
    found = joined(ends(BPE_TOKENS), *(joined(attention(b, bias=True), norms(b)) for b in blocks(3)))
    found |= mlp("model.layers.0.mlp")
    for block in blocks(3)[1:]:
        found |= joined(experts(f"{block}.mlp"), mlp(f"{block}.mlp.shared_experts", 32))
        found |= {f"{block}.mlp.gate.weight": (4, 64), f"{block}.mlp.gate.e_score_correction_bias": (4,)}
    extra = "model.layers.2"
    found |= {f"{extra}.{name}.weight": (64,) for name in ("enorm", "hnorm", "shared_head.norm")}
    return found | {f"{extra}.eh_proj.weight": (64, 128)}


def minimax(block: str) -> Shapes:
    found = joined(attention(block), norms(block), experts(f"{block}.block_sparse_moe", names=("w1", "w3", "w2")))
    found |= {f"{block}.self_attn.q_norm.weight": (64,), f"{block}.self_attn.k_norm.weight": (32,)}
    return found | {
        f"{block}.block_sparse_moe.gate.weight": (4, 64),
        f"{block}.block_sparse_moe.e_score_correction_bias": (4,),
    }


def gpt_oss(block: str, packed: bool) -> Shapes:
    found = joined(attention(block, bias=True), norms(block))
    found |= {f"{block}.self_attn.o_proj.bias": (64,), f"{block}.self_attn.sinks": (4,)}
    found |= {f"{block}.mlp.router.weight": (4, 64), f"{block}.mlp.router.bias": (4,)}
    found |= {f"{block}.mlp.experts.down_proj_bias": (4, 64), f"{block}.mlp.experts.gate_up_proj_bias": (4, 192)}
    if packed:
        for name, rows, size in (("gate_up_proj", 192, 64), ("down_proj", 64, 96)):
            found[f"{block}.mlp.experts.{name}_blocks"] = (4, rows, size // 32, 16)
            found[f"{block}.mlp.experts.{name}_scales"] = (4, rows, size // 32)
        return found
    return found | {f"{block}.mlp.experts.gate_up_proj": (4, 64, 192), f"{block}.mlp.experts.down_proj": (4, 96, 64)}


def gemma(count: int = 2, qk: bool = False) -> Shapes:
    more = ("pre_feedforward_layernorm", "post_feedforward_layernorm")
    return joined(*(joined(attention(b, norms=qk), mlp(f"{b}.mlp"), norms(b, *more)) for b in blocks(count)))


def phi3() -> Shapes:
    found = ends(PIECES)
    for block in blocks():
        found |= norms(block) | {
            f"{block}.self_attn.qkv_proj.weight": (128, 64), f"{block}.self_attn.o_proj.weight": (64, 64),
            f"{block}.mlp.gate_up_proj.weight": (192, 64), f"{block}.mlp.down_proj.weight": (64, 96),
        }  # fmt: skip
    return found
