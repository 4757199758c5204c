"""Checkpoints of a few MB in the layouts of real architectures, for whole GGUF files.

Their rows are as long as K-quants need, their weights are spread like weights, and the tensors of a layer lie in
several shards.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
from gguf_checkpoints_made import Case, bf16, is_packed, side_files, write_shard
from gguf_models_made import BPE, LLAMA3_ROPE, MODELS, SPM, config
from gguf_shapes_made import BPE_TOKENS, PIECES, Shapes, attention, blocks, dense, ends, experts, joined, mlp, norms
from importance_files_made import gguf, legacy
from numpy.typing import NDArray

OUTER, INNER = 4, 8  # how many times wider than in gguf_models_made: the model, and the insides of its feed-forwards
HIDDEN = 64  # there
INNER_KEYS = {"intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size"}
OUTER_KEYS = {
    "hidden_size", "head_dim", "kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim",
    "rotary_dim", "linear_key_head_dim", "linear_value_head_dim",
}  # fmt: skip
OLD_CALLS = 3
Importance = Mapping[str, tuple[NDArray[np.float32], NDArray[np.float32]]]
COUNTS = 8  # up to it a length is a number of heads or experts


@dataclass(frozen=True)
class FileCase:
    """A checkpoint in so many shards: of neighbours, or with tensor i of the case in shard i modulo their number."""

    case: Case
    shards: int = 1
    neighbours: bool = False
    dtype: str = "BF16"

    def parts(self) -> list[list[str]]:
        """The names of the tensors of each shard."""
        names, count = list(self.case.shapes), self.shards
        if self.neighbours:
            return [names[len(names) * i // count : len(names) * (i + 1) // count] for i in range(count)]
        return [names[i::count] for i in range(count)]


@dataclass(frozen=True)
class Wanted:
    """One file that is made of a checkpoint. `imatrix` is a format: "legacy" or "gguf"."""

    file_type: str
    imatrix: str | None = None
    pure: bool = False
    output_type: str | None = None
    embedding_type: str | None = None
    overrides: tuple[tuple[str, str], ...] = ()  # (regular expression, type)
    requantize: bool = False  # blocks of the source become other blocks

    @property
    def name(self) -> str:
        """Unique for one checkpoint."""
        flags = ["pure" if self.pure else None, "requantize" if self.requantize else None]
        words = [self.imatrix, *flags, self.output_type, self.embedding_type]
        return "-".join([self.file_type, *filter(None, words), *("=".join(pair) for pair in self.overrides)])


FILE_TYPES = (
    "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K_S", "Q3_K_M", "Q3_K_L", "Q4_K_S", "Q4_K_M",
    "Q5_K_S", "Q5_K_M", "Q6_K", "IQ4_NL", "IQ4_XS", "TQ1_0", "TQ2_0", "MXFP4_MOE",
)  # fmt: skip
OVERRIDES = (("ffn_(up|gate)", "Q3_K"), (r"blk\.1\.attn_v", "Q8_0"))
MORE: Mapping[str, tuple[Wanted, ...]] = {
    "llama": (
        *(Wanted(kind, "legacy") for kind in ("Q4_0", "Q5_0", "Q4_K_M", "Q2_K", "Q2_K_S", "IQ4_XS")),
        Wanted("Q4_K_M", overrides=OVERRIDES),
        Wanted("Q5_K_M", pure=True),
        Wanted("Q4_K_M", output_type="F16", embedding_type="Q8_0"),
    ),
    "qwen3": (
        Wanted("Q4_K_S", output_type="Q5_K"),
        Wanted("Q4_K_M", embedding_type="Q3_K"),
        Wanted("TQ1_0", pure=True),
    ),
    "qwen3moe": (
        *(Wanted(kind, "gguf") for kind in ("Q4_K_M", "Q3_K_L", "IQ4_NL")),
        Wanted("Q6_K", overrides=OVERRIDES),
    ),
    "qwen35": tuple(Wanted(kind, "gguf") for kind in ("Q4_K_M", "Q2_K", "IQ4_XS")),
    "qwen35moe": (Wanted("Q4_K_M", "legacy", overrides=((r"ssm_(alpha|beta)", "F16"), ("ssm_out", "Q8_0"))),),
    "phi3_f32": (Wanted("F32"),),
    "mixtral": (Wanted("Q5_K_S", "gguf", overrides=OVERRIDES),),
    "gpt_oss": tuple(Wanted(kind, requantize=True) for kind in ("Q8_0", "Q4_K_M", "Q2_K", "IQ4_XS")),
}


def wanted(name: str) -> tuple[Wanted, ...]:
    return (*(Wanted(kind) for kind in FILE_TYPES), *MORE.get(name, ()))


def importance(tensors: Mapping[str, tuple[int, ...]]) -> Importance:
    """Sums [slices, columns] and counts [slices] as llama-imatrix collects them, for tensors by name with their shapes
    in torch's order. The second of several experts has seen no token; the embedding is not a part, as in real ones."""
    found = {}
    for name, shape in tensors.items():
        if len(shape) > 1 and name.endswith(".weight") and "norm" not in name and not name.startswith("token_embd"):
            slices = shape[0] if len(shape) > 2 else 1
            sums = np.square(spread(f"importance of {name}", (slices, 1, shape[-1]))[:, 0]) + np.float32(2**-20)
            counts = (np.arange(slices) * 3 % 7 + 1).astype(np.float32)
            counts[1:2], sums[1:2] = 0, 0
            found[name] = (sums * counts[:, None] * np.float32(1.1), counts)
    return found


def imatrix_bytes(stats: Importance, form: str) -> bytes:
    """The file in one of the two formats; the old one has a single count for all slices."""
    if form == "gguf":
        return gguf(stats)
    return legacy({name: (OLD_CALLS, sums.reshape(-1).tolist()) for name, (sums, _) in stats.items()})


def divided(stats: Importance, form: str) -> dict[str, NDArray[np.float32]]:
    """The vectors that `llama-quantize` makes of that file: quotients in fp32, and ones where nothing was counted."""
    if form != "gguf":
        return {name: sums.reshape(-1) / np.float32(OLD_CALLS) for name, (sums, _) in stats.items()}
    with np.errstate(invalid="ignore"):
        return {n: np.where(c[:, None] > 0, s / c[:, None], np.float32(1)).reshape(-1) for n, (s, c) in stats.items()}


def widened(case: Case, outer: int = OUTER) -> Case:
    """The same model with longer rows."""
    shapes = {name: wider(name, shape, outer) for name, shape in case.shapes.items()}
    return replace(case, config=_wider_config(case.config, outer), shapes=shapes)


def _wider_config(config: Mapping[str, Any], outer: int) -> dict[str, Any]:
    factors = dict.fromkeys(INNER_KEYS, INNER) | dict.fromkeys(OUTER_KEYS, outer)
    sizes = {k: v * factors[k] if k in factors and v is not None else v for k, v in config.items()}
    return sizes | ({"text_config": _wider_config(config["text_config"], outer)} if "text_config" in config else {})


def wider(name: str, shape: tuple[int, ...], outer: int) -> tuple[int, ...]:
    inside = INNER if ".mlp." in name or ".block_sparse_moe." in name else outer
    if name.endswith(("embed_tokens.weight", "lm_head.weight")):
        return (shape[0], shape[1] * outer)
    if is_packed(name):  # [experts, rows, blocks of 32 columns, bytes]
        rows = shape[1] * (outer if shape[1] == HIDDEN else INNER)
        columns = shape[2] * (outer if shape[2] * 32 == HIDDEN else INNER)
        return (shape[0], rows, columns, *shape[3:])
    return tuple(d if d <= COUNTS else d * (outer if d == HIDDEN else inside) for d in shape)


def spread(name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Numbers as weights have them: near normal, of various sizes in various rows, some far out, some rows of zeros.

    They come of the raw stream of Philox, which no version of numpy may change, by exact arithmetic alone.
    """
    count = int(np.prod(shape, dtype=int))
    raw = np.random.Philox(key=crc32(name.encode())).random_raw(count)
    sums = raw.view(np.uint8).reshape(count, 8).sum(axis=1, dtype=np.int32) - np.int32(8 * 255 // 2)
    found: NDArray[np.float32] = sums.astype(np.float32) * np.float32(2**-13)
    if len(shape) == 1:
        return found + np.float32("norm" in name)
    found[::1009] *= np.float32(8)
    rows = found.reshape(-1, shape[-1])
    rows *= np.array([1, 1.5, 0.75, 1.25, 0.625], np.float32)[np.arange(len(rows)) % 5, None]
    rows[3::64] = 0
    return found.reshape(shape)


def packed(name: str, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """Codes of MXFP4, all there are, or their scales, some powers of two below one."""
    raw = np.random.Philox(key=crc32(name.encode())).random_raw(int(np.prod(shape, dtype=int))).reshape(shape)
    found = raw % np.uint64(256) if name.endswith("_blocks") else np.uint64(118) + raw % np.uint64(5)
    return np.asarray(found, np.uint8)


def write(made: FileCase, parent: Path) -> Path:
    """The checkpoint as a folder, with an index where it has several shards."""
    case = made.case
    folder = parent / case.folder
    folder.mkdir(parents=True)
    for name, data in side_files(case).items():
        (folder / name).write_bytes(data)
    files: dict[str, str] = {}
    for i, part in enumerate(made.parts()):
        file = f"model-{i + 1:05d}-of-{made.shards:05d}.safetensors" if made.shards > 1 else "model.safetensors"
        write_shard(
            folder / file, {name: (shape := case.shapes[name], *content(name, shape, made.dtype)) for name in part}
        )
        files |= dict.fromkeys(part, file)
    if made.shards > 1:
        total = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        index = {"metadata": {"total_size": total}, "weight_map": files}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def content(name: str, shape: tuple[int, ...], dtype: str) -> tuple[str, bytes]:
    """Type and bytes of a tensor."""
    if is_packed(name):
        return "U8", packed(name, shape).tobytes()
    found = spread(name, shape)
    return dtype, bf16(found) if dtype == "BF16" else found.astype({"F16": "<f2", "F32": "<f4"}[dtype]).tobytes()


def model(name: str, shards: int = 1, outer: int = OUTER, **more: Any) -> FileCase:
    case = MODELS[name]
    return FileCase(widened(replace(case, config={**case.config, **more}), outer), shards)


def deep_llama() -> Case:
    """So many layers that the first and the last eighth are not all, four query heads to one of keys, small insides."""
    layers = 9
    shapes: Shapes = ends(BPE_TOKENS)
    for block in blocks(layers):
        shapes |= joined(attention(block, kv=1), mlp(f"{block}.mlp", 32), norms(block))
    sizes = {"num_hidden_layers": layers, "num_key_value_heads": 1, "intermediate_size": 32, "head_dim": 16}
    own = config("LlamaForCausalLM", "llama", vocab_size=BPE_TOKENS, rope_theta=5e5, rope_scaling=LLAMA3_ROPE)
    return Case({**own, **sizes}, shapes, BPE, "llama-bpe", MODELS["llama"].texts)


def eight_experts() -> Case:
    """The number for which llama.cpp has rules of its own."""
    shapes: Shapes = ends(PIECES)
    for block in blocks():
        moe = f"{block}.block_sparse_moe"
        shapes |= joined(attention(block), norms(block), experts(moe, 8, names=("w1", "w3", "w2")))
        shapes[f"{moe}.gate.weight"] = (8, HIDDEN)
    sizes = {"num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 32, "rope_theta": 1e6}
    own = config("MixtralForCausalLM", "mixtral", vocab_size=PIECES)
    return Case({**own, **sizes}, shapes, SPM, folder="Mixture-8x1B")


def fused_experts() -> Case:
    """Stacks of experts as newer transformers saves them, a shared expert beside them."""
    shapes: Shapes = ends(BPE_TOKENS)
    for block in blocks():
        moe = f"{block}.mlp"
        shapes |= joined(attention(block, bias=True), norms(block), mlp(f"{moe}.shared_expert", 48))
        shapes |= {f"{moe}.gate.weight": (4, HIDDEN), f"{moe}.shared_expert_gate.weight": (1, HIDDEN)}
        shapes |= {f"{moe}.experts.gate_up_proj": (4, 192, HIDDEN), f"{moe}.experts.down_proj": (4, HIDDEN, 96)}
    base = MODELS["qwen2moe"]
    return replace(base, config={**base.config, "moe_intermediate_size": 96}, shapes=shapes)


def tied_qwen3() -> Case:
    base = MODELS["qwen3"]
    shapes = dense(BPE_TOKENS, tied=True, head=32, norms=True)
    return replace(base, config={**base.config, "tie_word_embeddings": True}, shapes=shapes)


FILES: Mapping[str, FileCase] = {
    "llama": FileCase(widened(deep_llama()), 3),
    "mixtral": FileCase(widened(eight_experts()), 2),
    "qwen2": model("qwen2"),
    "qwen3": FileCase(widened(tied_qwen3())),
    "qwen3moe": model("qwen3moe", 3),
    "qwen2moe": FileCase(widened(fused_experts()), 2),
    "qwen3next": model("qwen3next", 2),
    "qwen35": model("qwen35", 2),
    "qwen35_f16": replace(model("qwen35_vision"), dtype="F16"),
    "qwen35moe": model("qwen35moe", 3),
    "gemma2": model("gemma2"),
    "gemma2_f16": replace(model("gemma2"), dtype="F16"),
    "gemma3": model("gemma3", 2),
    "phi3": model("phi3"),
    "phi3_f32": replace(model("phi3"), dtype="F32"),
    "gpt_oss": replace(model("gpt_oss", 2), neighbours=True),  # as the converter needs: scales behind their blocks
    "gpt_oss_bf16": model("gpt_oss_bf16", 2),
    # Keys of 128 as in all real ones. llama.cpp takes it without q_lora_rank only if it says that it has 27 layers.
    "deepseek2": model("deepseek2", outer=8, num_hidden_layers=27),
    "deepseek3": model("deepseek3", 4, outer=8),
    "glm4moe": model("glm4moe", 2),
    "minimax": model("minimax", 3),
}
