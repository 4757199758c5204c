"""Write the golden files beside this script with mlx 0.32.4 and mlx-lm 0.32.2 (PROVENANCE.md says what is what):

python make_golden_mlx.py SCRATCH_FOLDER
"""

import importlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any, Final

mx: Any = importlib.import_module("mlx.core")

HERE: Final = Path(__file__).parent
INPUTS: Final = HERE.parent / "compressed_tensors" / "inputs"
BITS: Final = (2, 3, 4, 5, 6, 8)
GROUPS: Final = (32, 64, 128)
MODES: Final = {"mxfp4": (32, 4), "mxfp8": (32, 8), "nvfp4": (16, 4)}  # group, bits
ROWS: Final = {"mxfp4": (1, 4), "mxfp8": (1, 4), "nvfp4": (3, 5)}  # of extreme; the library writes nonsense for others
Arrays = dict[str, Any]


def quantize(weight: Any, group: int, bits: int, mode: str) -> Arrays:
    """What a quantized Linear of the library stores."""
    names = ("weight", "scales", "biases")
    return dict(zip(names, mx.quantize(weight, group_size=group, bits=bits, mode=mode), strict=False))


def write_matrices() -> None:
    """affine/ and the three float modes: one file for each dtype, one module for each case."""
    for path in sorted(INPUTS.glob("*.safetensors")):
        inputs = mx.load(str(path))
        plain, extreme = inputs["plain"], inputs["extreme"]
        cases = {f"b{b}-g{g}": (plain, g, b, "affine") for b in BITS for g in GROUPS}
        cases["b4-g64-extreme"] = (extreme, 64, 4, "affine")
        write("affine", path.stem, {name: quantize(*case) for name, case in cases.items()})
        for mode, (group, bits) in MODES.items():
            first, end = ROWS[mode]
            some = {"plain": plain, f"extreme-{first}-{end}": extreme[first:end]}
            write(mode, path.stem, {n: quantize(w, group, bits, mode) for n, w in some.items()})


def write(folder: str, name: str, modules: dict[str, Arrays]) -> None:
    """Write one file."""
    (HERE / folder).mkdir(exist_ok=True)
    tensors = {f"{module}.{k}": v for module, arrays in modules.items() for k, v in arrays.items()}
    mx.save_safetensors(str(HERE / folder / f"{name}.safetensors"), tensors, metadata={"format": "mlx"})


LLAMA: Final = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 64,
    "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "vocab_size": 32,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "hidden_act": "silu", "rms_norm_eps": 1e-6,
    "max_position_embeddings": 128, "rope_theta": 10000.0,
}  # fmt: skip
QWEN3_MOE: Final = {
    **LLAMA, "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "num_experts": 4,
    "num_experts_per_tok": 2, "moe_intermediate_size": 32, "decoder_sparse_step": 1, "mlp_only_layers": [],
    "norm_topk_prob": True, "tie_word_embeddings": True,
}  # fmt: skip


def shapes_of(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Tensors of a checkpoint with one layer."""
    hidden, heads, head = config["hidden_size"], config["num_attention_heads"], config["head_dim"]
    layer = "model.layers.0"
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config["vocab_size"], hidden),
        "model.norm.weight": (hidden,),
        f"{layer}.input_layernorm.weight": (hidden,),
        f"{layer}.post_attention_layernorm.weight": (hidden,),
        f"{layer}.self_attn.q_proj.weight": (heads * head, hidden),
        f"{layer}.self_attn.k_proj.weight": (config["num_key_value_heads"] * head, hidden),
        f"{layer}.self_attn.v_proj.weight": (config["num_key_value_heads"] * head, hidden),
        f"{layer}.self_attn.o_proj.weight": (hidden, heads * head),
    }
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    mlps, wide = [f"{layer}.mlp"], config["intermediate_size"]
    if config["model_type"] == "qwen3_moe":
        shapes |= {f"{layer}.self_attn.{n}_norm.weight": (head,) for n in "qk"}
        shapes[f"{layer}.mlp.gate.weight"] = (config["num_experts"], hidden)
        mlps = [f"{layer}.mlp.experts.{e}" for e in range(config["num_experts"])]
        wide = config["moe_intermediate_size"]
    for mlp in mlps:
        shapes |= {f"{mlp}.{n}_proj.weight": (wide, hidden) for n in ("gate", "up")}
        shapes[f"{mlp}.down_proj.weight"] = (hidden, wide)
    return shapes


def write_source(folder: Path, config: dict[str, Any]) -> None:
    """A checkpoint with random weights."""
    folder.mkdir(parents=True)
    keys = iter(mx.random.split(mx.random.key(20261122), 64))
    tensors = {
        n: (mx.random.normal(s, key=next(keys)) * 0.05).astype(mx.bfloat16) for n, s in shapes_of(config).items()
    }
    mx.save_safetensors(str(folder / "model.safetensors"), tensors, metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")


def write_tokenizer(folder: Path) -> None:
    """The smallest tokenizer that mlx_lm.convert accepts; not kept."""
    tokenizers, transformers = importlib.import_module("tokenizers"), importlib.import_module("transformers")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<s>": 0, "a": 1}, unk_token="<s>"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<s>").save_pretrained(folder)


def override(path: str, _module: Any) -> bool | dict[str, Any]:
    """6 bits for v_proj, nothing for o_proj, the default for the rest."""
    if path.endswith("v_proj"):
        return {"group_size": 32, "bits": 6, "mode": "affine"}
    return not path.endswith("o_proj")


def write_models(scratch: Path) -> None:
    """models/NAME/: the source, and what mlx_lm.convert makes of it."""
    convert: Any = importlib.import_module("mlx_lm.convert").convert
    runs: dict[str, tuple[str, dict[str, Any]]] = {
        "llama-affine4": ("llama", {"q_group_size": 32, "q_bits": 4}),
        "llama-override": ("llama", {"q_group_size": 32, "q_bits": 4, "quant_predicate": override}),
        "llama-mxfp8": ("llama", {"q_mode": "mxfp8"}),
        "qwen3_moe-affine4": ("qwen3_moe", {"q_group_size": 32, "q_bits": 4}),
        "qwen3_moe-nvfp4": ("qwen3_moe", {"q_mode": "nvfp4"}),
        "qwen3_moe-mxfp4": ("qwen3_moe", {"q_mode": "mxfp4"}),
    }
    for name, config in (("llama", LLAMA), ("qwen3_moe", QWEN3_MOE)):
        kept = HERE / "models" / f"{name}-source"
        shutil.rmtree(kept, ignore_errors=True)
        write_source(kept, config)
        shutil.copytree(kept, scratch / name)
        write_tokenizer(scratch / name)
    for name, (source, options) in runs.items():
        convert(str(scratch / source), mlx_path=str(scratch / name), quantize=True, **options)
        kept = HERE / "models" / name
        kept.mkdir(exist_ok=True)
        for file in ("config.json", "model.safetensors", "model.safetensors.index.json"):
            shutil.copyfile(scratch / name / file, kept / file)


if __name__ == "__main__":
    mx.set_default_device(mx.cpu)
    write_matrices()
    write_models(Path(sys.argv[1]))
