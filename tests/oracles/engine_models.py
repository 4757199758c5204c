"""Small checkpoints that engines load, and twins of quantized ones: the same model, with weights as we read them."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file

from shardq.files.safetensors import read_header
from shardq.kernels import load as load_kernels
from shardq.layouts import find_layout
from shardq.ledger import LEDGER, decode_ledger
from shardq.outputs import target_of
from shardq.serving.judge import Verdict, judge
from shardq.serving.served import read_served
from shardq.sources import open_source
from shardq.staging import PROVENANCE
from shardq.unpack import OutputShard, read_module

WriteCheckpoint = Callable[[Path, Mapping[str, Any], Mapping[str, torch.Tensor]], Path]

HIDDEN, INTERMEDIATE, EXPERTS, EXPERT_INTERMEDIATE = 256, 512, 4, 128
HEADS, KV_HEADS, HEAD_DIM, LAYERS, VOCABULARY = 4, 2, 64, 2, 512
_QWEN3: Final = {
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 128,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "attention_bias": False,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "torch_dtype": "bfloat16",
}
CONFIGS: Final[Mapping[str, Mapping[str, Any]]] = {
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", **_QWEN3},
    "qwen3_moe": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "num_experts": EXPERTS,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": EXPERT_INTERMEDIATE,
        "decoder_sparse_step": 1,
        "norm_topk_prob": True,
        "mlp_only_layers": [],
        **_QWEN3,
    },
}
LINEARS: Final = {"qwen3": LAYERS * 7, "qwen3_moe": LAYERS * (4 + 3 * EXPERTS)}  # matrices that are quantized
PROMPT: Final = (1, 5, 300, 17, 400, 9, 121, 250, 33, 470, 8, 64)
NEW_TOKENS: Final = 8  # that are asked for behind it


def write_model(kind: str, folder: Path, write_checkpoint: WriteCheckpoint) -> Path:
    """A Qwen3-shaped checkpoint in BF16, `kind` a key of CONFIGS, with random weights such that every layer matters."""
    rng = torch.Generator().manual_seed(11)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return (torch.randn(rows, columns, generator=rng) / columns**0.5).bfloat16()

    def norm(size: int) -> torch.Tensor:
        return (1 + 0.1 * torch.randn(size, generator=rng)).bfloat16()

    def mlp(prefix: str, size: int) -> dict[str, torch.Tensor]:
        return {f"{prefix}.gate_proj.weight": matrix(size, HIDDEN), f"{prefix}.up_proj.weight": matrix(size, HIDDEN),
                f"{prefix}.down_proj.weight": matrix(HIDDEN, size)}  # fmt: skip

    tensors = {"model.embed_tokens.weight": torch.randn(VOCABULARY, HIDDEN, generator=rng).bfloat16()}
    for i in range(LAYERS):
        at, block = f"model.layers.{i}", f"model.layers.{i}.self_attn"
        for name, heads in (("q_proj", HEADS), ("k_proj", KV_HEADS), ("v_proj", KV_HEADS)):
            tensors[f"{block}.{name}.weight"] = matrix(heads * HEAD_DIM, HIDDEN)
        tensors[f"{block}.o_proj.weight"] = matrix(HIDDEN, HEADS * HEAD_DIM)
        tensors |= {f"{block}.{n}.weight": norm(HEAD_DIM) for n in ("q_norm", "k_norm")}
        tensors |= {f"{at}.{n}.weight": norm(HIDDEN) for n in ("input_layernorm", "post_attention_layernorm")}
        if kind == "qwen3_moe":
            tensors[f"{at}.mlp.gate.weight"] = matrix(EXPERTS, HIDDEN)
            for expert in range(EXPERTS):
                tensors |= mlp(f"{at}.mlp.experts.{expert}", EXPERT_INTERMEDIATE)
        else:
            tensors |= mlp(f"{at}.mlp", INTERMEDIATE)
    tensors["model.norm.weight"] = norm(HIDDEN)
    tensors["lm_head.weight"] = 3 * matrix(VOCABULARY, HIDDEN)
    return write_checkpoint(folder, CONFIGS[kind], tensors)


class Module(NamedTuple):
    """A quantized matrix as we read it back."""

    name: str
    weight: torch.Tensor  # [rows, columns], float32
    zeros: torch.Tensor  # [rows, G], float32; 2**(bits-1) where the layout stores none


def quantized_modules(folder: Path) -> Iterator[Module]:
    """Every tensor that the ledger calls quantized, read under the scheme that the configuration gives its module."""
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    layout = find_layout(json.loads((folder / PROVENANCE).read_text())["identity"]["recipe.layout"])
    kernels, source = load_kernels(), open_source(str(folder))
    headers = {path.name: read_header(path) for path in folder.glob("*.safetensors")}
    for name, entry in decode_ledger((folder / LEDGER).read_bytes())["tensors"].items():
        if entry["outcome"] != "quantized":
            continue
        place, file = target_of(name, entry), entry["file"]
        scheme = layout.scheme_of(config, place.module)
        assert scheme is not None, f"{place.module} is quantized, and the configuration says it is not"
        q = read_module(OutputShard(source, file, headers[file]), place, layout, scheme, kernels)
        rows, columns = q.codes.shape
        weight, group = np.empty((rows, columns), np.float32), scheme.group_columns(columns)
        scales = q.scales if q.global_scale is None else q.scales / np.float32(q.global_scale)
        if q.biases is not None:
            kernels.decode_affine(q.codes, scales, q.biases, group, "bias", weight)
        elif q.zeros is None:
            kernels.decode_scaled(q.codes, scheme.element, scales, group, weight)
        else:
            kernels.dequantize_int(q.codes, scales, q.zeros, group, weight)
        zeros = np.full_like(q.scales, 1 << (scheme.bits - 1)) if q.zeros is None else q.zeros.astype(np.float32)
        yield Module(name.removesuffix(".weight"), torch.from_numpy(weight), torch.from_numpy(zeros))


def write_twin(
    source: Path, quantized: Path, folder: Path, dtype: torch.dtype, write_checkpoint: WriteCheckpoint
) -> Path:
    """`source` with the weights of `quantized` instead, all in `dtype`, unquantized."""
    tensors = {k: v.to(dtype) for path in sorted(source.glob("*.safetensors")) for k, v in load_file(path).items()}
    for module in quantized_modules(quantized):
        assert tensors[f"{module.name}.weight"].shape == module.weight.shape
        tensors[f"{module.name}.weight"] = module.weight.to(dtype)
    config = json.loads((source / "config.json").read_text())
    return write_checkpoint(folder, config, tensors)


def judged(folder: Path, engine: str, device: str = "") -> str:
    """What `shardq verify` says of a folder in an engine: "loads", "limits" or "no"."""
    return _judge(folder, engine, device).answer


def reasons(folder: Path, engine: str) -> tuple[str, ...]:
    """Why it says so."""
    return tuple(reason.text for reason in _judge(folder, engine).reasons)


def _judge(folder: Path, engine: str, device: str = "") -> Verdict:
    config = json.loads((folder / "config.json").read_text())
    headers = [read_header(path) for path in sorted(folder.glob("*.safetensors"))]
    served = read_served({t.name: (t.dtype, t.shape) for header in headers for t in header.tensors}, config)
    return next(v for v in judge(served, 1, device) if v.engine == engine)


def transformers_logits(folder: Path, dtype: torch.dtype, tokens: Sequence[int] = PROMPT) -> torch.Tensor:
    """Logits [1, tokens, vocabulary] of an unquantized model in `dtype`."""
    from transformers import AutoModelForCausalLM

    load = AutoModelForCausalLM.from_pretrained
    model, found = load(folder, dtype=dtype, output_loading_info=True)
    assert not any(found.values()), found
    with torch.no_grad():
        return model(torch.tensor([list(tokens)])).logits


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over the norm of what is expected."""
    found, expected = found.float(), expected.float()
    return float(torch.linalg.norm(found - expected) / torch.linalg.norm(expected))
