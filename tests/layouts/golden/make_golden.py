"""Write the golden files beside this script with the formats' own libraries. Run by hand, once for each new case:

    python make_golden.py SCRATCH_FOLDER

in an environment with auto-round 0.16.1 and GPTQModel 7.7.0 (PROVENANCE.md in each folder says how it was made).
"""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import torch
from safetensors.torch import load_file, save_file

HERE: Final = Path(__file__).parent
ROWS, COLUMNS, GROUP = 96, 64, 32
MODULE: Final = "model.layers.0.self_attn.q_proj"


def make_weight() -> torch.Tensor:
    """[ROWS, COLUMNS] bf16: normal rows of various sizes behind a few that are easy to get wrong."""
    rng = torch.Generator().manual_seed(20251121)
    w = torch.randn(ROWS, COLUMNS, generator=rng) * 0.02 * torch.exp(0.5 * torch.randn(ROWS, 1, generator=rng))
    w[0] = 0.0
    w[1, 0], w[1, 1] = 0.25, -0.25  # the largest magnitude with both signs
    w[2] = w[2].abs()
    w[3] = -w[3].abs()
    w[4] *= 1e-6  # scale below the smallest one
    w[5] *= 1e-2  # scale among fp16's subnormals
    w[6] *= 1e5
    w[7, ::2] = -0.0
    return w.to(torch.bfloat16)


def write_checkpoint(folder: Path, weight: torch.Tensor) -> None:
    """A one-layer Qwen3 checkpoint whose q_proj is `weight`, with the tokenizer that the whole-model flow wants."""
    folder.mkdir(parents=True)
    heads, hidden, wide = ROWS // 32, COLUMNS, 64
    shapes = {
        "model.embed_tokens": (300, hidden), "model.norm": (hidden,),
        "model.layers.0.input_layernorm": (hidden,), "model.layers.0.post_attention_layernorm": (hidden,),
        "model.layers.0.self_attn.q_norm": (32,), "model.layers.0.self_attn.k_norm": (32,),
        "model.layers.0.self_attn.k_proj": (ROWS, hidden), "model.layers.0.self_attn.v_proj": (ROWS, hidden),
        "model.layers.0.self_attn.o_proj": (hidden, ROWS), "model.layers.0.mlp.gate_proj": (wide, hidden),
        "model.layers.0.mlp.up_proj": (wide, hidden), "model.layers.0.mlp.down_proj": (hidden, wide),
    }  # fmt: skip
    tensors = {f"{k}.weight": torch.full(s, 0.5, dtype=torch.bfloat16) for k, s in shapes.items()}
    save_file({**tensors, f"{MODULE}.weight": weight}, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": hidden, "intermediate_size": wide,
        "num_hidden_layers": 1, "num_attention_heads": heads, "num_key_value_heads": heads, "head_dim": 32,
        "vocab_size": 300, "tie_word_embeddings": True, "torch_dtype": "bfloat16", "hidden_act": "silu",
        "rms_norm_eps": 1e-6, "max_position_embeddings": 512,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    tokenizers, transformers = importlib.import_module("tokenizers"), importlib.import_module("transformers")
    vocab = {c: i for i, c in enumerate(["<s>", *sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<s>", pad_token="<s>").save_pretrained(
        folder
    )


def run_auto_round(source: Path, out: Path, bits: int, symmetric: bool) -> dict[str, torch.Tensor]:
    """What auto-round writes for MODULE: model-free, or by the whole-model flow for 3 bits."""
    flow = ["--iters", "0", "--disable_model_free"] if bits == 3 else ["--model_free"]
    flow += ["--format", "auto_round", "--disable_opt_rtn", "--disable_torch_compile", "--device_map", "cpu"]
    words = ["--model", str(source), "--scheme", f"W{bits}A16", "--group_size", str(GROUP), *flow]
    words += [] if symmetric else ["--asym"]
    environ = {**os.environ, "HF_HUB_OFFLINE": "1", "AR_ALLOW_W8_ASYM": "1", "AR_MODEL_FREE_SHARD_PARALLELISM": "1"}
    command = [sys.executable, "-m", "auto_round", *words, "--output_dir", str(out)]
    subprocess.run(command, check=True, env=environ)
    found: dict[str, torch.Tensor] = {}
    for path in out.rglob("*.safetensors"):
        found |= load_file(path)
    return {k.removeprefix(MODULE + "."): v for k, v in found.items() if k.startswith(MODULE + ".")}


def take_codes(weight: torch.Tensor, bits: int, symmetric: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weight, scales and zero points as auto-round's own functions give them in float32, for GPTQModel's packer."""
    functions: Any = importlib.import_module("auto_round.data_type.int")
    quantize = functions.quant_tensor_sym if symmetric else functions.quant_tensor_asym
    dequantized, scale, zero = quantize(weight.float(), bits=bits, group_size=GROUP)
    scales = scale.reshape(ROWS, -1).float()
    zeros = torch.full_like(scales, zero) if symmetric else zero.reshape(ROWS, -1)
    return dequantized, scales, zeros


def run_gptqmodel(weight: torch.Tensor, bits: int, symmetric: bool, version: int) -> dict[str, torch.Tensor]:
    """What GPTQModel packs for auto-round's codes."""
    kernel: Any = importlib.import_module("gptqmodel.nn_modules.qlinear.torch").TorchLinear
    convert: Any = importlib.import_module("gptqmodel.utils.model").convert_gptq_v2_to_v1_format_module
    dequantized, scales, zeros = take_codes(weight, bits, symmetric)
    linear = torch.nn.Linear(COLUMNS, ROWS, bias=False)
    linear.weight.data = dequantized
    packed = kernel(
        bits=bits, group_size=GROUP, sym=symmetric, desc_act=False, in_features=COLUMNS, out_features=ROWS, bias=False,
        pack_dtype=torch.int32, register_buffers=True,
    )  # fmt: skip
    g_idx = torch.arange(COLUMNS, dtype=torch.int32) // GROUP
    packed.pack_original(linear, scales, zeros, g_idx)
    if version == 1:
        convert(packed, SimpleNamespace(bits=bits, pack_dtype=torch.int32))
    return {k: getattr(packed, k) for k in ("qweight", "qzeros", "scales", "g_idx")}


def run_qlinear(weight: torch.Tensor, bits: int, symmetric: bool, kind: str, **words: bool) -> dict[str, torch.Tensor]:
    """What auto-round's QuantLinear of that module packs for its codes."""
    module: Any = importlib.import_module(f"auto_round_extension.torch.{kind}")
    dequantized, scales, zeros = take_codes(weight, bits, symmetric)
    linear = torch.nn.Linear(COLUMNS, ROWS, bias=False)
    linear.weight.data = dequantized
    packed = module.QuantLinear(bits, GROUP, COLUMNS, ROWS, False, **words)
    packed.device = "cpu"
    packed.pack(linear, scales, 2 ** (bits - 1) if symmetric else zeros, None, "cpu")
    names = ("qweight", "qzeros", "scales", "g_idx") if words else ("qweight", "qzeros", "scales")
    return {k: getattr(packed, k) for k in names}


def save(folder: str, case: str, tensors: dict[str, torch.Tensor]) -> None:
    """Write one case."""
    (HERE / folder).mkdir(exist_ok=True)
    save_file({k: v.contiguous() for k, v in tensors.items()}, HERE / folder / f"{case}.safetensors")


def main() -> None:
    """Make every case."""
    scratch, weight = Path(sys.argv[1]), make_weight()
    write_checkpoint(scratch / "source", weight)
    save_file({"weight": weight.view(torch.uint16)}, HERE / "weight.safetensors")
    for case in ("sym2", "sym3", "sym4", "sym8", "asym2", "asym4", "asym8"):
        bits, symmetric = int(case[-1]), case.startswith("sym")
        save("auto_round", case, run_auto_round(scratch / "source", scratch / case, bits, symmetric))
    for case in ("sym5", "sym6", "sym7", "asym3", "asym5", "asym6", "asym7"):
        kind = "qlinear_torch_zp" if case.startswith("sym") else "qlinear_torch"
        save("auto_round", case, run_qlinear(weight, int(case[-1]), case.startswith("sym"), kind))
    for case in ("sym3", "sym4", "sym6", "sym8", "asym4"):
        tensors = run_qlinear(weight, int(case[-1]), case.startswith("sym"), "qlinear_torch", g_idx=True)
        save("auto_round/gptqmodel", case, tensors)
    for case in ("sym4", "sym8", "asym3", "asym4"):
        symmetric = case.startswith("sym")
        save("gptq", case, run_gptqmodel(weight, int(case[-1]), symmetric, 1 if symmetric else 2))
    for case in ("sym2", "sym3", "sym4", "sym8", "asym4", "asym8"):
        save("gptq_v2", case, run_gptqmodel(weight, int(case[-1]), case.startswith("sym"), 2))


if __name__ == "__main__":
    main()
