"""Models of many small tensors, and what to make of them, for the element types of GGUF files."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shardq.files.gguf import KeyValue
from shardq.gguf.file_types import FILE_TYPES, find_file_type
from shardq.gguf.mixtures import TypeOptions, Wanted

GOLDEN = Path(__file__).parent / "golden_gguf_types"
Shapes = Mapping[str, tuple[tuple[int, ...], str | None]]  # by name: shape in GGUF's order, type


@dataclass(frozen=True)
class Case:
    """One model. `more` are keys of its architecture that llama.cpp asks for besides."""

    arch: str
    blocks: int
    heads: int
    kv_heads: int
    tensors: Shapes
    experts: int = 0
    more: Mapping[str, Any] = field(default_factory=dict)
    full: bool = True  # all file types; else those whose rules differ by blocks


@dataclass(frozen=True)
class Run:
    """One way to quantize. With `weighed` all tensors have entries in an imatrix."""

    name: str
    options: TypeOptions
    weighed: bool


def pairs(case: Case) -> tuple[KeyValue, ...]:
    """Metadata with which llama.cpp takes the model."""
    counts = {
        "context_length": 64, "embedding_length": 256, "block_count": case.blocks,
        "attention.head_count": case.heads, "attention.head_count_kv": case.kv_heads,
        **({"expert_count": case.experts, "expert_used_count": 1} if case.experts else {}), **case.more,
    }  # fmt: skip
    epsilon = KeyValue(f"{case.arch}.attention.layer_norm_rms_epsilon", "f32", 1e-5)
    found = [KeyValue("general.architecture", "string", case.arch), epsilon]
    for key, value in counts.items():
        kind = "f32" if isinstance(value, float) else "i32" if isinstance(value, tuple) else "u32"
        found.append(KeyValue(f"{case.arch}.{key}", kind, value))
    return tuple(found)


def wanted(case: Case, weighed: bool) -> tuple[Wanted, ...]:
    """The tensors, by name: in another order than that in which they are written."""
    return tuple(Wanted(name, *case.tensors[name], weighed) for name in sorted(case.tensors))


def runs(case: Case) -> Iterator[Run]:
    """What to make of a case; gpt-oss has its MXFP4 quantized again."""
    mxfp4 = any(kind == "MXFP4" for _, kind in case.tensors.values())
    columns = case.tensors["token_embd.weight"][0][0]
    for kind in FILE_TYPES:
        if not (case.full or kind.name in BY_BLOCK) or (mxfp4 and kind.base in ("F16", "BF16", "F32")):
            continue
        for weighed in (False, True):
            if weighed or kind.name != "Q2_K_S":
                yield Run(f"{kind.name}{'+imatrix' * weighed}", TypeOptions(kind, requantize=mxfp4), weighed)
    for name, choice in CHOICES.items() if case.full else ():
        kind_name, _, _ = name.partition(" ")
        file_type = find_file_type(kind_name)
        assert file_type
        # llama.cpp fails with embeddings of no whole blocks, and where MXFP4 would be made F16
        if not (mxfp4 and file_type.base == "F16") and not (columns % 32 and "embedding_type" in choice):
            yield Run(name, TypeOptions(file_type, requantize=mxfp4, **choice), False)


BY_BLOCK = ("Q4_0", "Q5_0", "Q2_K", "Q2_K_S", "Q3_K_M", "Q4_K_S", "Q4_K_M", "Q5_K_M", "IQ4_NL", "IQ4_XS")
CHOICES: Mapping[str, dict[str, Any]] = {
    "Q4_K_M pure": {"pure": True},
    "MXFP4_MOE pure": {"pure": True},
    "TQ1_0 pure output": {"pure": True, "output_type": "Q8_0"},
    "Q4_K_M output": {"output_type": "BF16"},
    "Q3_K_M embedding": {"embedding_type": "q8_0"},
    "Q4_K_M ends": {"output_type": "F32", "embedding_type": "F16"},
    "F16 ends": {"output_type": "F32", "embedding_type": "BF16"},
    "Q4_K_M values": {"overrides": ((r"BLK\.[02]\.attn_(v|qkv|kv_b|v_b)\.", "q8_0"), ("attn_(k_b|output)", "IQ4_XS"))},
    "Q5_K_M down": {"overrides": ((r"blk\.1\.ffn_down", "F16"), (r"[2-5]\.ffn_down(_exps)?\.weight$", "tq2_0"))},
    "Q4_K_S all": {"overrides": ((".*", "Q6_K"),), "output_type": "Q8_0", "pure": True},
    "Q4_K_S tables": {"overrides": (("embd", "Q5_K"),), "embedding_type": "Q8_0"},
    "MXFP4_MOE some": {"overrides": (("exps|output", "Q4_K"),), "embedding_type": "Q8_0"},
}  # fmt: skip


def ends(columns: int, tied: bool = False) -> dict[str, tuple[tuple[int, ...], str | None]]:
    found: dict[str, tuple[tuple[int, ...], str | None]] = {
        "token_embd.weight": ((columns, 3), None),
        "output_norm.weight": ((columns,), "F32"),
    }
    return found if tied else {**found, "output.weight": ((columns, 3), None)}


def stems(blocks: range, columns: int, down: int, *names: str) -> dict[str, tuple[tuple[int, ...], str | None]]:
    """Tensors of blocks, by their names: a number behind a colon is how many slices they have."""
    found: dict[str, tuple[tuple[int, ...], str | None]] = {}
    for block in blocks:
        for name in names:
            stem, _, slices = name.partition(":")
            full = f"blk.{block}.{stem}" if "." in stem else f"blk.{block}.{stem}.weight"
            row = down if "down" in stem else columns
            if "norm" in stem or "sinks" in stem or "bias" in stem or "inp_shexp" in stem:
                found[full] = ((columns, 2), "F32") if "exps.bias" in stem else ((columns,), "F32")
            elif "gate_inp" in stem:
                found[full] = ((columns, 2), "F32")
            else:
                found[full] = ((row, 1, int(slices)), None) if slices else ((row, 2), None)
    return found


ATTENTION = ("attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_norm")
DENSE = (*ATTENTION, "ffn_gate", "ffn_up", "ffn_down")
EXPERTS = ("ffn_gate_inp", "ffn_gate_exps:4", "ffn_up_exps:4", "ffn_down_exps:4")
SHARED = ("ffn_gate_shexp", "ffn_up_shexp", "ffn_down_shexp")
LATENT = (
    "attn_norm", "attn_q_a", "attn_q_a_norm", "attn_q_b", "attn_kv_a_mqa", "attn_kv_a_norm", "attn_k_b:2", "attn_v_b:2",
    "attn_output", "ffn_norm",
)  # fmt: skip
FULL = ("attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "attn_q_norm", "attn_k_norm")
SSM = ("ssm_conv1d", "ssm_dt.bias", "ssm_norm", "ssm_out")
FEW = ("attn_v", "attn_k", "attn_output", "ffn_down")  # of models with many blocks


def dense(blocks: int, columns: int, down: int, tied: bool = False, *more: str) -> Shapes:
    return {**ends(columns, tied), **stems(range(blocks), columns, down, *DENSE, *more)}


def deepseek(blocks: int, columns: int, *attention: str) -> Shapes:
    return {
        **ends(columns),
        **stems(range(1), columns, columns, *attention, "ffn_gate", "ffn_up", "ffn_down"),
        **stems(range(1, blocks), columns, 256, *attention, *EXPERTS, *SHARED, "exp_probs_b.bias"),
    }


def linear(layers: int, further: int, mixing: tuple[str, ...], inner: tuple[str, ...]) -> Shapes:
    """Each fourth layer has full attention, and those behind the last."""
    found = ends(256)
    for block in range(layers + further):
        is_full = (block + 1) % 4 == 0 or block >= layers
        own = FULL if is_full else ("attn_norm", "attn_qkv", "attn_gate", *mixing)
        found |= stems(range(block, block + 1), 256, 256, *own, "post_attention_norm", *inner)
    return found | stems(range(layers, layers + further), 256, 256, *NEXT[:2])


def gpt_oss(blocks: int) -> Shapes:
    bias = ("ffn_gate_exps.bias", "ffn_up_exps.bias", "ffn_down_exps.bias", "attn_q.bias")
    found = stems(range(blocks), 2880, 2880, *ATTENTION, "attn_sinks", *EXPERTS, *bias)
    codes = {name: (shape, "MXFP4" if "exps.weight" in name else kind) for name, (shape, kind) in found.items()}
    return {**ends(2880), **codes}


def odd() -> Shapes:
    """Names that are kept, matrices in fp32, shapes that are vectors after all."""
    return {
        **dense(3, 256, 288),
        "position_embd.weight": ((256, 2), None),
        "token_types.weight": ((256, 2), None),
        "rope_freqs.weight": ((128,), "F32"),
        "per_layer_token_embd.weight": ((256, 2), None),
        "blk.0.ssm_conv1d.weight": ((4, 256), "F32"),
        "blk.0.altup_router.weight": ((256, 2), None),
        "blk.0.indexer.k_proj.weight": ((256, 2), None),
        "blk.0.extra.weight": ((256, 2), "F32"),
        "blk.0.extra_f16.weight": ((256, 2), "F16"),
        "blk.0.extra_flat.weight": ((256, 1), "F32"),
        "blk.0.extra_row.weight": ((256, 1, 1), None),
        "blk.0.extra.scale": ((256, 2), "F32"),
        "blk.1.attn_v.weights": ((256, 2), None),
        "blk.10.extra.weight": ((256, 2), None),
        "blk.2.Extra.weight": ((256, 2), None),
        "blk.02.extra.weight": ((256, 2), None),
        "zzz.weight": ((32, 2), None),
        "blk.weight": ((64, 2), None),
    }


MLA = {
    "leading_dense_block_count": 1, "attention.q_lora_rank": 8, "attention.kv_lora_rank": 8,
    "expert_feed_forward_length": 256, "expert_shared_count": 1,
}  # fmt: skip
OSS = {"expert_feed_forward_length": 2880, "attention.sliding_window": 128}
NEXT = ("nextn.eh_proj.weight", "nextn.enorm.weight", "nextn.embed_tokens.weight", "nextn.shared_head_head.weight")

LINEAR = {
    "ssm.conv_kernel": 4, "ssm.inner_size": 256, "ssm.state_size": 16, "ssm.time_step_rank": 16, "ssm.group_count": 8,
    "full_attention_interval": 4,
}  # fmt: skip
SECTIONS = {"rope.dimension_sections": (11, 11, 10, 0), "nextn_predict_layers": 1}

CASES: Mapping[str, Case] = {
    "llama_16": Case("llama", 16, 8, 8, dense(16, 256, 512)),
    "llama_32_shared": Case("llama", 32, 8, 2, {**ends(256), **stems(range(32), 256, 256, *FEW)}),
    "llama_80_shared": Case("llama", 80, 8, 1, {**ends(256), **stems(range(80), 256, 256, *FEW)}, full=False),
    "llama_80": Case("llama", 80, 8, 8, {**ends(256), **stems(range(80), 256, 256, *FEW)}, full=False),
    "llama_80_eight": Case("llama", 80, 8, 2, {**ends(256), **stems(range(80), 256, 256, *FEW)}, 8, full=False),
    "qwen2_80": Case("qwen2", 80, 8, 8, {**ends(256), **stems(range(80), 256, 256, *FEW)}, full=False),
    "qwen2_81": Case("qwen2", 81, 8, 8, {**ends(256, True), **stems(range(81), 256, 256, "attn_v")}, full=False),
    "qwen3_80": Case("qwen3", 80, 8, 4, {**ends(256), **stems(range(80), 256, 256, *FEW)}, full=False),
    "llama_tied_288": Case("llama", 4, 9, 3, dense(4, 288, 512, True)),
    "qwen2_128": Case("qwen2", 5, 4, 2, dense(5, 128, 272)),
    "qwen3_tied_272": Case("qwen3", 3, 8, 2, dense(3, 272, 256, True, "attn_q_norm", "attn_k_norm")),
    "mixtral": Case("llama", 16, 8, 2, {**ends(256), **stems(range(16), 256, 288, *ATTENTION, *EXPERTS)}, 8),
    "qwen2moe": Case(
        "qwen2moe", 9, 4, 4,
        {**ends(256), **stems(range(9), 256, 128, *ATTENTION, *EXPERTS, *SHARED, "ffn_gate_inp_shexp")}, 60,
    ),
    "qwen3moe": Case("qwen3moe", 30, 8, 1, {**ends(256), **stems(range(30), 256, 256, *ATTENTION, *EXPERTS)}, 64),
    "qwen3next": Case(
        "qwen3next", 12, 8, 2, linear(12, 0, ("ssm_ba", *SSM), (*EXPERTS, *SHARED, "ffn_gate_inp_shexp")), 512, LINEAR
    ),
    "qwen35": Case(
        "qwen35", 25, 8, 2, linear(24, 1, ("ssm_alpha", "ssm_beta", *SSM), ("ffn_gate", "ffn_up", "ffn_down")),
        more=LINEAR | SECTIONS,
    ),
    "qwen35moe": Case(
        "qwen35moe", 17, 8, 1,
        linear(16, 1, ("ssm_alpha", "ssm_beta", *SSM), (*EXPERTS, *SHARED, "ffn_gate_inp_shexp")), 256,
        LINEAR | SECTIONS,
    ),
    "deepseek2": Case("deepseek2", 17, 8, 1, deepseek(17, 256, *LATENT), 64, MLA),
    "deepseek2_joined": Case("deepseek2", 9, 2, 2, deepseek(9, 256, "attn_q", "attn_kv_b", "attn_output"), 4, MLA),
    "glm4moe": Case(
        "glm4moe", 10, 12, 2,
        {
            **ends(256), **stems(range(1), 256, 256, *DENSE),
            **stems(range(1, 10), 256, 256, *ATTENTION, "attn_q.bias", *EXPERTS, *SHARED, "exp_probs_b.bias"),
            **stems(range(9, 10), 256, 256, *NEXT),
        },
        16, {**MLA, "nextn_predict_layers": 1},
    ),
    "minimax": Case(
        "minimax-m2", 11, 12, 2, {**ends(256), **stems(range(11), 256, 256, *ATTENTION, *EXPERTS, "exp_probs_b.bias")},
        32, {"expert_feed_forward_length": 256},
    ),
    "gemma2": Case("gemma2", 7, 4, 2, dense(7, 256, 256, True, "post_attention_norm", "post_ffw_norm")),
    "gemma3": Case(
        "gemma3", 18, 4, 1, dense(18, 256, 256, True, "attn_q_norm"), more={"attention.head_count": (4, *(2,) * 17)}
    ),
    "phi3": Case(
        "phi3", 16, 4, 4,
        {**ends(256), **stems(range(16), 256, 256, "attn_norm", "attn_qkv", "attn_output", "ffn_up", "ffn_down")},
    ),
    "gpt_oss": Case("gpt-oss", 12, 8, 1, gpt_oss(12), 32, OSS),
    "odd": Case("llama", 3, 8, 8, odd()),
}  # fmt: skip
