"""Synthetic checkpoints for the benches: BF16 decoders with the spread of real weights."""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from shardq.files.safetensors import TensorSpec, plan_file

SHARD_BYTES: Final = 350_000_000
ROWS: Final = 1024  # made at once
TOKENIZER_FILES: Final = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")
Fill = Callable[[tuple[int, int]], NDArray[np.uint16]]


def write_qwen3(folder: Path, gigabytes: float) -> Path:
    """A Qwen3 of about that size, hidden size 2048 (1024 below 1 GB), shards of at most 350 MB. Reused if it exists."""
    hidden = 2048 if gigabytes >= 1 else 1024
    return _write_decoder(folder, gigabytes, _config(hidden, vocabulary=16 * hidden))


def _write_decoder(folder: Path, gigabytes: float, config: dict[str, Any]) -> Path:
    embeddings = 2 * config["vocab_size"] * config["hidden_size"] * 2
    layer = sum(2 * s.shape[0] * (s.shape[1] if len(s.shape) > 1 else 1) for s in _layer(0, config))
    config["num_hidden_layers"] = max(1, round((gigabytes * 1e9 - embeddings) / layer))
    specs = [*_ends(config), *(s for n in range(config["num_hidden_layers"]) for s in _layer(n, config))]
    return write(folder, config, list(_shards(specs)), _spread(np.random.default_rng(20251121)))


def write_layers(folder: Path, layers: int) -> Path:
    """A Qwen3 of hidden size 256 with a shard of 4.3 MB for each layer. Reused if it exists."""
    config = _config(256, vocabulary=256) | {"num_hidden_layers": layers}
    shards = [list(_layer(n, config)) for n in range(layers)]
    shards[0] += _ends(config)
    return write(folder, config, shards, _spread(np.random.default_rng(20251121)))


def write_llama(folder: Path, gigabytes: float, tokenizer: Path) -> Path:
    """A Llama of about that size, hidden size 2048, with the tokenizer of another checkpoint. Reused if it exists.

    All of its rows are whole blocks of 256 columns, which llama.cpp's types want.
    """
    vocabulary = json.loads((tokenizer / "tokenizer.json").read_text())
    tokens = [*vocabulary["model"]["vocab"].values(), *(t["id"] for t in vocabulary["added_tokens"])]
    config = _config(2048, vocabulary=-(-(max(tokens) + 1) // 256) * 256)
    config |= {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "intermediate_size": 5632,
        "num_key_value_heads": 4, "mlp_bias": False,
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    for path in tokenizer.iterdir():
        if path.name in TOKENIZER_FILES:
            shutil.copy(path, folder)
    return _write_decoder(folder, gigabytes, config)


def write_plain(folder: Path, shards: int, tensors: int, tensor_bytes: int) -> Path:
    """`shards` files of `tensors` matrices of `tensor_bytes` each, 4096 columns, the same values over and over."""
    names = iter(f"model.layers.{n}.mlp.up_proj.weight" for n in range(shards * tensors))
    shape = (tensor_bytes // 8192, 4096)
    specs = [[TensorSpec(next(names), "BF16", shape) for _ in range(tensors)] for _ in range(shards)]
    tile = _spread(np.random.default_rng(1))((ROWS, 4096))
    return write(folder, _config(4096, 64), specs, lambda shape: tile[: shape[0]])


def write(folder: Path, config: Mapping[str, Any], shards: Sequence[Sequence[TensorSpec]], fill: Fill) -> Path:
    """Write shards, index and config.json, which comes last: a folder that has it is complete."""
    if (folder / "config.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    weight_map: dict[str, str] = {}
    for number, specs in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= {s.name: name for s in specs}
        plan = plan_file(specs)
        with (folder / name).open("wb") as f:
            f.write(plan.header)
            for spec in sorted(specs, key=lambda s: plan.offsets[s.name]):
                rows, columns = (*spec.shape, 1)[:2]
                for row in range(0, rows, ROWS):
                    f.write(fill((min(ROWS, rows - row), columns)).tobytes())
    index = {"metadata": {}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    return folder


def _spread(rng: np.random.Generator) -> Fill:
    """Normal weights, a different spread for each row and column, 0.1 % of them eight times as large."""

    def fill(shape: tuple[int, int]) -> NDArray[np.uint16]:
        w = rng.standard_normal(shape, np.float32) * np.float32(0.02)
        w *= np.exp(np.float32(0.3) * rng.standard_normal((shape[0], 1), np.float32))
        w *= np.exp(np.float32(0.25) * rng.standard_normal((1, shape[1]), np.float32))
        flat = w.reshape(-1)
        flat[rng.integers(0, flat.size, max(1, flat.size // 1000))] *= np.float32(8)
        bits = w.view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)

    return fill


def _config(hidden: int, vocabulary: int) -> dict[str, Any]:
    return {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": hidden,
        "intermediate_size": 3 * hidden, "num_hidden_layers": 1, "num_attention_heads": 16, "num_key_value_heads": 8,
        "head_dim": 128, "vocab_size": vocabulary, "tie_word_embeddings": False, "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6, "rope_theta": 1e6, "hidden_act": "silu", "torch_dtype": "bfloat16",
        "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 0, "eos_token_id": 1, "use_cache": True,
    }  # fmt: skip


def _ends(config: Mapping[str, Any]) -> Iterator[TensorSpec]:
    shape = (config["vocab_size"], config["hidden_size"])
    yield TensorSpec("model.embed_tokens.weight", "BF16", shape)
    yield TensorSpec("lm_head.weight", "BF16", shape)
    yield TensorSpec("model.norm.weight", "BF16", shape[1:])


def _layer(number: int, config: Mapping[str, Any]) -> Iterator[TensorSpec]:
    hidden, inner, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    query, key = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    shapes: dict[str, tuple[int, ...]] = {
        "input_layernorm": (hidden,), "post_attention_layernorm": (hidden,),
        **({"self_attn.q_norm": (head,), "self_attn.k_norm": (head,)} if config["model_type"] == "qwen3" else {}),
        "self_attn.q_proj": (query, hidden), "self_attn.k_proj": (key, hidden), "self_attn.v_proj": (key, hidden),
        "self_attn.o_proj": (hidden, query),
        "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner),
    }  # fmt: skip
    for name, shape in shapes.items():
        yield TensorSpec(f"model.layers.{number}.{name}.weight", "BF16", shape)


def _shards(specs: Sequence[TensorSpec]) -> Iterator[list[TensorSpec]]:
    """Cut in order, as long as a shard stays below SHARD_BYTES."""
    batch: list[TensorSpec] = []
    for spec in specs:
        if batch and plan_file([*batch, spec]).size_bytes > SHARD_BYTES:
            yield batch
            batch = []
        batch.append(spec)
    yield batch
