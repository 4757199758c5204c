"""Tiny random models of transformers, as folders, and their own logits: for tests that are sure of transformers."""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file

from shardq.kernels import load
from shardq.plans import make_plan
from shardq.recipe import Recipe
from shardq.sources import open_source
from shardq.sources.base import Source
from shardq.tune import driver, passes
from shardq.tune.blocks import BlockModel
from shardq.tune.served import serving
from shardq.tune.subjects import find_subjects
from shardq.tune.work import put_codes

WORDS: Final = 96
SMALL: Final = {
    "vocab_size": WORDS, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
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


ROPE: Final = {"rope_type": "default", "mrope_section": [4, 2, 2], "mrope_interleaved": True, "rope_theta": 10000.0}
TEXT: Final = {**SMALL, "rope_parameters": ROPE}
TOWER: Final = {
    "depth": 2, "hidden_size": 48, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64, "patch_size": 14,
    "num_position_embeddings": 16, "deepstack_visual_indexes": [0],
}  # fmt: skip
IMAGES: Final = {"image_token_id": 95, "video_token_id": 94, "vision_start_token_id": 93, "vision_end_token_id": 92}
PER_LAYER: Final = {
    "hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": WORDS, "laurel_rank": 8,
    "num_kv_shared_layers": 0, "altup_num_inputs": 2, "activation_sparsity_pattern": [0.0] * 3,
    "layer_types": [NEAR, "full_attention", NEAR],
}  # fmt: skip
LINEAR: Final = {
    "layer_types": ["linear_attention", "full_attention", "linear_attention"], "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
}  # fmt: skip
MODELS: Final[Mapping[str, Callable[[], Any]]] = {
    "llama": lambda: _config("LlamaConfig"),
    "tied": lambda: _config("LlamaConfig", tie_word_embeddings=True),
    "qwen2": lambda: _config("Qwen2Config", num_key_value_heads=4),
    "qwen3": lambda: _config("Qwen3Config"),
    "qwen3_moe": lambda: _config("Qwen3MoeConfig", num_experts=8, **MOE),
    "mixtral": lambda: _config("MixtralConfig", num_local_experts=4, num_experts_per_tok=2),
    "gemma3": lambda: _config("Gemma3TextConfig", sliding_window=8, layer_types=[NEAR, "full_attention", NEAR]),
    "deepseek_v3": lambda: _config("DeepseekV3Config", **MOE, **LATENT),
    "gpt_oss": lambda: _config("GptOssConfig", num_local_experts=4, num_experts_per_tok=2, sliding_window=8),
    "llama4": lambda: _config(
        "Llama4TextConfig",
        num_local_experts=4,
        intermediate_size=32,
        intermediate_size_mlp=96,
        moe_layers=[0, 2],
        attention_chunk_size=16,
    ),
    "qwen3_vl_moe": lambda: transformers.Qwen3VLMoeConfig(
        text_config={**TEXT, "num_experts": 4, **MOE}, vision_config=TOWER, **IMAGES
    ),
    "phi3": lambda: _config("Phi3Config", pad_token_id=0),
    "opt": lambda: _config("OPTConfig", ffn_dim=96, word_embed_proj_dim=64),
    "qwen3_vl": lambda: transformers.Qwen3VLConfig(text_config=TEXT, vision_config=TOWER, **IMAGES),
    "qwen3_next": lambda: _config(
        "Qwen3NextConfig", num_experts=4, shared_expert_intermediate_size=32, **MOE, **LINEAR
    ),
    "qwen3_5": lambda: _config("Qwen3_5TextConfig", **LINEAR),
    "gemma3n": lambda: _config("Gemma3nTextConfig", **PER_LAYER),
}


def auto_class(config: Any) -> Any:
    """The class of transformers that a model loads with."""
    known = type(config) in transformers.AutoModelForCausalLM._model_mapping
    return transformers.AutoModelForCausalLM if known else transformers.AutoModelForImageTextToText


def make_model(name: str, folder: Path, dtype: torch.dtype = torch.bfloat16, **saving: Any) -> Path:
    """Write a model with random weights, norms and biases included, and a tokenizer of numbers."""
    config = MODELS[name]()
    torch.manual_seed(0)
    model = auto_class(config).from_config(config, dtype=dtype)
    with torch.no_grad():
        for values in (*model.parameters(), *(b for n, b in model.named_buffers() if "correction" in n)):
            values.add_(torch.randn_like(values) * 0.05)
    model.save_pretrained(folder, **saving)
    write_tokenizer(folder)
    return folder


def write_tokenizer(folder: Path) -> None:
    """Words are numbers; those from 90 on are special."""
    special = [
        {"id": i, "content": str(i), "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
         "special": True}
        for i in range(90, WORDS)
    ]  # fmt: skip
    model = {"type": "WordLevel", "vocab": {str(i): i for i in range(WORDS)}, "unk_token": "95"}
    content = {"version": "1.0", "added_tokens": special, "pre_tokenizer": {"type": "Whitespace"}, "model": model}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    (folder / "tokenizer_config.json").write_text(json.dumps({"unk_token": "95"}))


def scatter(folder: Path, out: Path, shards: int) -> Path:
    """The same checkpoint with its tensors dealt out to so many shards, one after the other."""
    tensors = {name: t for path in folder.glob("*.safetensors") for name, t in load_file(path).items()}
    out.mkdir()
    names = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    places = {name: names[i % shards] for i, name in enumerate(sorted(tensors))}
    for shard in names:
        save_file({n: t for n, t in tensors.items() if places[n] == shard}, out / shard, metadata={"format": "pt"})
    (out / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    for path in folder.glob("*.json"):
        if "index" not in path.name:
            (out / path.name).write_bytes(path.read_bytes())
    return out


def load_whole(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The whole model, loaded by transformers."""
    auto = auto_class(transformers.AutoConfig.from_pretrained(folder))
    return auto.from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()


@torch.no_grad()
def whole_logits(folder: Path, ids: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Of the whole model."""
    found: torch.Tensor = load_whole(folder, dtype)(input_ids=ids, use_cache=False).logits
    return found


@torch.no_grad()
def block_logits(source: Source | Path, ids: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Of the same, block by block, all samples at once."""
    opened = open_source(str(source)) if isinstance(source, Path) else source
    with BlockModel.open(opened, dtype=dtype, attention="eager") as model:
        batch = model.embed(ids)
        for index in range(len(model.block_names)):
            with model.block(index) as module:
                model.prefetch(index + 1)
                batch = batch.moved(model.run(module, batch, index))
        return model.logits(batch.hidden)


def some_ids(samples: int = 2, tokens: int = 24, vocabulary: int = 90) -> torch.Tensor:
    """The same for every call."""
    return torch.randint(0, vocabulary, (samples, tokens), generator=torch.Generator().manual_seed(1))


def perplexity(loss: torch.Tensor) -> float:
    """Of losses of tokens."""
    return math.exp(loss.mean())


@torch.no_grad()
def coded_error(folder: Path, out: Path, recipe: Recipe) -> float:
    """Mean square of what is behind the last block, with tuned codes and inputs as they are served beside without, on
    the samples of the tuning."""
    ids = torch.from_numpy(np.load(out / driver.IDS))
    with BlockModel.open(open_source(str(folder)), dtype=torch.float32) as model:
        subjects = find_subjects(model, make_plan(model.checkpoint, recipe))
        plain, coded = model.embed(ids), model.embed(ids)
        for index, own in enumerate(subjects.blocks):
            with model.block(index) as block:
                model.advance(block, plain, index)
                put_codes(block, own, passes.read_stored(out, model.block_names[index], own).codes, load())
                with serving(block, own, {}):
                    model.advance(block, coded, index)
        return float((plain.hidden - coded.hidden).square().mean())
