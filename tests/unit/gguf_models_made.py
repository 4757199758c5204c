"""Tiny checkpoints in the layouts of real architectures, for the metadata and tensors of GGUF."""

import json
from collections.abc import Mapping
from typing import Any

from gguf_checkpoints_made import Case
from gguf_shapes_made import (
    BPE_TOKENS,
    PIECES,
    attention,
    blocks,
    deepseek,
    dense,
    ends,
    experts,
    gated_delta,
    gemma,
    glm4_moe,
    gpt_oss,
    joined,
    minimax,
    norms,
    phi3,
    qwen_dense,
    qwen_fused,
    qwen_moe,
    qwen_single,
)

SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "max_position_embeddings": 512,
}  # fmt: skip


BPE = {"tokenizer.json": "bpe.json", "tokenizer_config.json": "bpe_config.json"}
SPM = {"tokenizer.model": "pieces.model", "tokenizer_config.json": "pieces_config.json"}


def config(kind: str, model_type: str, **more: Any) -> dict[str, Any]:
    return {"architectures": [kind], "model_type": model_type, "torch_dtype": "bfloat16", **SIZES, **more}


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

LINEAR = {
    "head_dim": 16, "full_attention_interval": 2, "linear_conv_kernel_dim": 4, "linear_key_head_dim": 12,
    "linear_value_head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
}  # fmt: skip
QWEN_EXPERTS = {
    "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 48,
}  # fmt: skip
QWEN_LAYERS = {
    "layer_types": ["linear_attention", "full_attention"],
    "rope_parameters": {
        "mrope_interleaved": True, "mrope_section": [1, 1, 0], "rope_type": "default", "rope_theta": 10000000,
        "partial_rotary_factor": 0.5,
    },
}  # fmt: skip

MODELS: Mapping[str, Case] = {
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
    "qwen3next": Case(
        config("Qwen3NextForCausalLM", "qwen3_next", vocab_size=BPE_TOKENS, **LINEAR, **QWEN_EXPERTS),
        gated_delta(qwen_single, joint=True),
        BPE,
        "qwen2",
    ),
    "qwen35": Case(
        config("Qwen3_5ForCausalLM", "qwen3_5_text", vocab_size=BPE_TOKENS, mtp_num_hidden_layers=1, **LINEAR),
        gated_delta(qwen_dense),
        BPE,
        "qwen35",
    ),
    "qwen35_vision": Case(
        {
            "architectures": ["Qwen3_5ForConditionalGeneration"],
            "model_type": "qwen3_5",
            "tie_word_embeddings": True,
            "text_config": {
                **SIZES,
                **LINEAR,
                **QWEN_LAYERS,
                "model_type": "qwen3_5_text",
                "vocab_size": BPE_TOKENS,
                "mtp_num_hidden_layers": 1,
            },
            "vision_config": {"model_type": "qwen3_5_vision", "depth": 1, "hidden_size": 32, "num_heads": 2},
        },
        {
            **{k.replace("model.", "model.language_model."): v for k, v in gated_delta(qwen_dense, head=False).items()},
            "model.visual.blocks.0.attn.qkv.weight": (96, 32),
            "model.visual.patch_embed.proj.bias": (32,),
        },
        BPE,
        "qwen35",
    ),
    "qwen35moe": Case(
        {
            "architectures": ["Qwen3_5MoeForConditionalGeneration"],
            "model_type": "qwen3_5_moe",
            "text_config": {
                **SIZES,
                **LINEAR,
                **QWEN_LAYERS,
                **QWEN_EXPERTS,
                "moe_intermediate_size": 96,
                "model_type": "qwen3_5_moe_text",
                "vocab_size": BPE_TOKENS,
            },
        },
        gated_delta(qwen_fused),
        BPE,
        "qwen35",
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
