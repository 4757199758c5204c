"""Tiny checkpoints in the layouts of real architectures, for the metadata and tensors of GGUF."""

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

GOLDEN = Path(__file__).parent / "golden_gguf_model"
BPE_TOKENS, PIECES = 300, 320  # of the tokenizers in GOLDEN
SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "max_position_embeddings": 512,
}  # fmt: skip
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Case:
    """One checkpoint. `tokenizer` are files of GOLDEN by the names that they get; `texts` further files."""

    config: Mapping[str, Any]
    shapes: Shapes
    tokenizer: Mapping[str, str]
    pre: str | None = None
    texts: Mapping[str, str] | None = None
    folder: str = "Tiny-Model-1B-Instruct-v1.2"


BPE = {"tokenizer.json": "bpe.json", "tokenizer_config.json": "bpe_config.json"}
SPM = {"tokenizer.model": "pieces.model", "tokenizer_config.json": "pieces_config.json"}


def config(kind: str, model_type: str, **more: Any) -> dict[str, Any]:
    return {"architectures": [kind], "model_type": model_type, "torch_dtype": "bfloat16", **SIZES, **more}


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


LLAMA3_ROPE = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
CARD = """---
license: apache-2.0
language:
- en
- no
base_model: example-org/Base-Model-7B-v0.3
datasets:
- example-org/some-data
tags: [chat]
pipeline_tag: text-generation
---
# Tiny
"""
GENERATION = json.dumps({"temperature": 0.6, "top_k": 20, "top_p": 0.95, "repetition_penalty": 1.05, "do_sample": True})
DEEPSEEK = {
    "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 12, "n_routed_experts": 4,
    "n_shared_experts": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1, "moe_intermediate_size": 32,
    "vocab_size": BPE_TOKENS, "num_key_value_heads": 4, "routed_scaling_factor": 2.5, "norm_topk_prob": True,
    "rope_theta": 10000.0,
}  # fmt: skip


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


LONG_ROPE = {
    "type": "longrope",
    "long_factor": [1.0 + i / 7 for i in range(8)],
    "short_factor": [1.0 + i / 90 for i in range(8)],
}
YARN = {
    "type": "yarn",
    "factor": 40,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 4096,
}
OSS_YARN = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}

CASES: Mapping[str, Case] = {
    "llama": Case(
        config(
            "LlamaForCausalLM",
            "llama",
            vocab_size=BPE_TOKENS,
            rope_theta=500000.0,
            head_dim=16,
            bos_token_id=0,
            eos_token_id=[1, 2],
        ),
        dense(BPE_TOKENS),
        BPE,
        "llama-bpe",
        {"README.md": CARD, "generation_config.json": GENERATION},
    ),
    "llama_rope": Case(
        config(
            "LlamaForCausalLM",
            "llama",
            vocab_size=BPE_TOKENS + 20,
            rope_theta=500000.0,
            rope_scaling=LLAMA3_ROPE,
            head_dim=128,
            tie_word_embeddings=True,
        ),
        dense(BPE_TOKENS + 20, tied=True, head=128),
        BPE,
        "llama-bpe",
        None,
        "tiny",
    ),
    "llama_pieces": Case(
        config("LlamaForCausalLM", "llama", vocab_size=PIECES + 8, num_key_value_heads=4),
        dense(PIECES + 8, kv=4),
        SPM,
        folder="example.7b",
    ),
    "llama_json_pieces": Case(
        config("LlamaForCausalLM", "llama", vocab_size=PIECES + 2),
        dense(PIECES + 2),
        {"tokenizer.json": "pieces.json", "tokenizer_config.json": "pieces_config.json"},
    ),
    "mistral": Case(
        config("MistralForCausalLM", "mistral", vocab_size=PIECES, sliding_window=None, rope_theta=1000000.0),
        dense(PIECES),
        SPM,
    ),
    "mixtral": Case(
        config(
            "MixtralForCausalLM",
            "mixtral",
            vocab_size=PIECES,
            num_local_experts=4,
            num_experts_per_tok=2,
            rope_theta=1e6,
        ),
        joined(
            ends(PIECES),
            *(
                joined(
                    attention(b),
                    norms(b),
                    experts(f"{b}.block_sparse_moe", names=("w1", "w3", "w2")),
                    {f"{b}.block_sparse_moe.gate.weight": (4, 64)},
                )
                for b in blocks()
            ),
        ),
        SPM,
        folder="Mixture-4x1B",
    ),
    "qwen2": Case(
        config("Qwen2ForCausalLM", "qwen2", vocab_size=BPE_TOKENS + 4, rope_theta=1000000.0, tie_word_embeddings=True),
        dense(BPE_TOKENS + 4, tied=True, bias=True),
        BPE,
        "qwen2",
    ),
    "qwen3": Case(
        config(
            "Qwen3ForCausalLM",
            "qwen3",
            vocab_size=BPE_TOKENS,
            head_dim=32,
            rope_theta=1000000,
            rope_scaling={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
        ),
        dense(BPE_TOKENS, head=32, norms=True),
        BPE,
        "qwen2",
    ),
    "qwen2moe": Case(
        config(
            "Qwen2MoeForCausalLM",
            "qwen2_moe",
            vocab_size=BPE_TOKENS,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=32,
            shared_expert_intermediate_size=48,
            rope_theta=1000000.0,
        ),
        joined(ends(BPE_TOKENS), *(qwen_moe(b, 48, bias=True) for b in blocks())),
        BPE,
        "qwen2",
    ),
    "qwen3moe": Case(
        config(
            "Qwen3MoeForCausalLM",
            "qwen3_moe",
            vocab_size=BPE_TOKENS,
            head_dim=32,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=32,
            rope_theta=1000000.0,
        ),
        joined(ends(BPE_TOKENS), *(qwen_moe(b, head=32, norms=True) for b in blocks())),
        BPE,
        "qwen2",
    ),
    "qwen3moe_stacked": Case(
        config(
            "Qwen3MoeForCausalLM",
            "qwen3_moe",
            vocab_size=BPE_TOKENS,
            head_dim=32,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=32,
            rope_theta=1000000.0,
        ),
        joined(
            ends(BPE_TOKENS),
            *(
                joined(
                    attention(b, head=32, norms=True),
                    norms(b),
                    {
                        f"{b}.mlp.gate.weight": (4, 64),
                        f"{b}.mlp.experts.gate_up_proj": (4, 64, 64),
                        f"{b}.mlp.experts.down_proj": (4, 64, 32),
                    },
                )
                for b in blocks()
            ),
        ),
        BPE,
        "qwen2",
    ),
    "gemma2": Case(
        config("Gemma2ForCausalLM", "gemma2", vocab_size=PIECES, head_dim=16, sliding_window=256),
        joined(ends(PIECES), gemma()),
        SPM,
    ),
    "gemma3": Case(
        config(
            "Gemma3ForCausalLM",
            "gemma3_text",
            vocab_size=PIECES,
            head_dim=16,
            sliding_window=256,
            rope_theta=1000000,
            rope_local_base_freq=10000,
        ),
        joined(ends(PIECES, False), gemma(qk=True)),
        SPM,
    ),
    "gemma3_bpe": Case(
        config("Gemma3ForCausalLM", "gemma3_text", vocab_size=BPE_TOKENS, head_dim=16, sliding_window=256),
        joined({"model.embed_tokens.weight": (BPE_TOKENS + 12, 64), "model.norm.weight": (64,)}, gemma(qk=True)),
        BPE,
        "gpt-2",
    ),
    "gemma3_vision": Case(
        {
            "architectures": ["Gemma3ForConditionalGeneration"],
            "model_type": "gemma3",
            "text_config": {
                **SIZES,
                "model_type": "gemma3_text",
                "vocab_size": PIECES,
                "head_dim": 16,
                "sliding_window": 256,
                "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            },
            "vision_config": {
                "model_type": "siglip_vision_model",
                "hidden_size": 32,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "intermediate_size": 64,
            },
        },
        {
            **{f"language_model.{k}": v for k, v in joined(ends(PIECES, False), gemma(qk=True)).items()},
            "vision_tower.vision_model.embeddings.patch_embedding.bias": (32,),
            "multi_modal_projector.mm_soft_emb_norm.weight": (32,),
        },
        SPM,
    ),
    "phi3": Case(
        config("Phi3ForCausalLM", "phi3", vocab_size=PIECES, original_max_position_embeddings=512, sliding_window=200),
        phi3(),
        SPM,
    ),
    "phi3_long": Case(
        config(
            "Phi3ForCausalLM", "phi3", vocab_size=PIECES, original_max_position_embeddings=128, rope_scaling=LONG_ROPE
        ),
        phi3(),
        SPM | {"tokenizer.json": "pieces.json"},
    ),
    "deepseek2": Case(
        config(
            "DeepseekV2ForCausalLM",
            "deepseek_v2",
            **{
                **DEEPSEEK,
                "q_lora_rank": None,
                "n_group": 1,
                "topk_group": 1,
                "rope_scaling": YARN,
                "scoring_func": "softmax",
            },
        ),
        deepseek(0, False),
        BPE,
        "deepseek-llm",
    ),
    "deepseek3": Case(
        config(
            "DeepseekV3ForCausalLM",
            "deepseek_v3",
            **{
                **DEEPSEEK,
                "q_lora_rank": 24,
                "n_group": 2,
                "topk_group": 1,
                "rope_scaling": YARN,
                "scoring_func": "sigmoid",
                "num_nextn_predict_layers": 1,
            },
        ),
        deepseek(24, True) | {"model.layers.2.eh_proj.weight": (64, 128), "model.layers.2.enorm.weight": (64,)},
        BPE,
        "deepseek-v3",
    ),
    "glm4moe": Case(
        config(
            "Glm4MoeForCausalLM",
            "glm4_moe",
            vocab_size=BPE_TOKENS,
            head_dim=16,
            n_routed_experts=4,
            n_shared_experts=1,
            num_experts_per_tok=2,
            moe_intermediate_size=32,
            first_k_dense_replace=1,
            partial_rotary_factor=0.5,
            num_nextn_predict_layers=1,
            routed_scaling_factor=1.0,
            rope_theta=1000000,
        ),
        glm4_moe(),
        BPE,
        "glm4",
    ),
    "minimax": Case(
        config(
            "MiniMaxM2ForCausalLM",
            "minimax_m2",
            vocab_size=BPE_TOKENS,
            head_dim=16,
            num_local_experts=4,
            num_experts_per_tok=2,
            rotary_dim=8,
            scoring_func="sigmoid",
            rope_theta=5000000,
            intermediate_size=32,
        ),
        joined(ends(BPE_TOKENS), *(minimax(b) for b in blocks())),
        BPE,
        "minimax-m2",
    ),
    "gpt_oss": Case(
        config(
            "GptOssForCausalLM",
            "gpt_oss",
            vocab_size=BPE_TOKENS,
            head_dim=16,
            num_local_experts=4,
            experts_per_token=2,
            num_experts_per_tok=2,
            sliding_window=128,
            rope_theta=150000,
            rope_scaling=OSS_YARN,
            quantization_config={"quant_method": "mxfp4"},
        ),
        joined(ends(BPE_TOKENS), *(gpt_oss(b, True) for b in blocks())),
        BPE,
        "gpt-4o",
    ),
    "gpt_oss_bf16": Case(
        config(
            "GptOssForCausalLM",
            "gpt_oss",
            vocab_size=BPE_TOKENS,
            head_dim=16,
            num_local_experts=4,
            experts_per_token=2,
            num_experts_per_tok=2,
            sliding_window=128,
            rope_theta=150000,
            rope_scaling=OSS_YARN,
        ),
        joined(ends(BPE_TOKENS), *(gpt_oss(b, False) for b in blocks())),
        BPE,
        "gpt-4o",
    ),
}


def values(name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Numbers that differ between tensors and rows, and that BF16 holds."""
    count = int(np.prod(shape, dtype=int))
    mixed = (np.arange(count, dtype=np.uint64) * np.uint64(2654435761) + np.uint64(crc32(name.encode()))) >> np.uint64(
        7
    )
    return ((mixed % np.uint64(255)).astype(np.float32).reshape(shape) - np.float32(127)) / np.float32(128)


def is_packed(name: str) -> bool:
    return name.endswith(("_blocks", "_scales"))


def codes(name: str, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    return (values(name, shape) * 128 + 127).astype(np.uint8)


def side_files(case: Case) -> dict[str, bytes]:
    found = {name: (GOLDEN / stored).read_bytes() for name, stored in case.tokenizer.items()}
    found |= {name: text.encode() for name, text in (case.texts or {}).items()}
    return {"config.json": json.dumps(case.config).encode(), **found}


def write(case: Case, parent: Path) -> Path:
    """The checkpoint as a folder with one shard, in BF16."""
    folder = parent / case.folder
    folder.mkdir(parents=True)
    for name, data in side_files(case).items():
        (folder / name).write_bytes(data)
    header, body = {}, b""
    for name, shape in case.shapes.items():
        data = codes(name, shape).tobytes() if is_packed(name) else bf16(values(name, shape))
        kind = "U8" if is_packed(name) else "BF16"
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [len(body), len(body) + len(data)]}
        body += data
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + body)
    return folder


def bf16(data: NDArray[np.float32]) -> bytes:
    """As BF16, to the nearest even; not for NaN."""
    bits = np.ascontiguousarray(data).view(np.uint32).astype(np.uint64)
    return (
        ((bits + np.uint64(0x7FFF) + ((bits >> np.uint64(16)) & np.uint64(1))) >> np.uint64(16)).astype("<u2").tobytes()
    )
