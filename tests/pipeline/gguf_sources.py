"""Checkpoints of several shards that become GGUF files, made of the tiny ones of tests/unit. On no path; see
encoded_sources.py."""

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from zlib import crc32

import encoded_sources as sources
import gguf_checkpoints_made as checkpoints
import gguf_models_made as made
from encoded_numbers import Stored, store_as
from gguf_files_made import packed
from gguf_shapes_made import BPE_TOKENS, Shapes, blocks, ends, joined, mlp, norms

from shardq.gguf.options import GgufOptions
from shardq.recipe import Recipe, make_recipe

SHARDS: Final = "*.safetensors"
INDEX: Final = "model.safetensors.index.json"
LAYER: Final = re.compile(r"layers\.(\d+)\.")


def llama(hidden: int, inner: int, head: int, layers: int) -> checkpoints.Case:
    """A Llama of four heads of queries and two of keys."""
    config = made.config(
        "LlamaForCausalLM", "llama", vocab_size=BPE_TOKENS, head_dim=head, num_hidden_layers=layers,
        hidden_size=hidden, intermediate_size=inner,
    )  # fmt: skip
    shapes: Shapes = {}
    for block in blocks(layers):
        rows = {"q_proj": 4 * head, "k_proj": 2 * head, "v_proj": 2 * head}
        shapes |= {f"{block}.self_attn.{name}.weight": (count, hidden) for name, count in rows.items()}
        shapes |= {f"{block}.self_attn.o_proj.weight": (hidden, 4 * head)}
        shapes |= _widened(joined(mlp(f"{block}.mlp", inner), norms(block)), hidden)
    return checkpoints.Case(config, joined(_widened(ends(BPE_TOKENS), hidden), shapes), made.BPE, "llama-bpe")


def _widened(shapes: Shapes, hidden: int) -> Shapes:
    """For another size than 64."""
    return {name: tuple(hidden if n == 64 else n for n in shape) for name, shape in shapes.items()}


# For runs by the thousand: a layer, and parts of a file that other shards than theirs write into.
SMALLEST: Final = llama(64, 32, 16, 1)
# For what is measured: shards of 7 MB.
LARGE: Final = llama(512, 1536, 128, 4)
# Matrices of 64 columns, queries and keys in slabs that end within a head: see `short_spans`.
ROTARY: Final = llama(64, 96, 704, 2)


@dataclass(frozen=True, slots=True)
class Source:
    """A checkpoint and where its tensors lie."""

    case: checkpoints.Case
    place: sources.Place
    shards: int


def by_layer(name: str) -> int:
    """What is before the layers, each of two layers, and the head last: it comes first in a file."""
    found = LAYER.search(name)
    return 2 + int(found[1]) if found else 1 if "embed" in name else 4


def of_the_last(name: str) -> int:
    """A shard for each of four layers, and one for all else behind them, as a file begins with it."""
    found = LAYER.search(name)
    return 1 + int(found[1]) if found else 5


def by_kind(name: str) -> int:
    """Two shards of a layer."""
    return 2 if "mlp" in name or "lm_head" in name else 1


def dropped_last(name: str) -> int:
    """What becomes nothing: a matrix in a shard of its own, a vector among others."""
    return 3 if "eh_proj" in name else 2 if LAYER.search(name) else 1


def scattered(name: str) -> int:
    """Anywhere, so that experts of a stack and matrices of a layer are apart."""
    return 1 + crc32(name.encode()) % 3


def scales_first(name: str) -> int:
    """As `sources.scales_first`, with head and norm in a shard behind all."""
    place: int = sources.scales_first(name)
    return 4 if name.startswith(("lm_head", "model.norm")) else place


FP8: Final = checkpoints.Case({}, {}, made.BPE)  # filled with the tensors of `sources`
SOURCES: Final[Mapping[str, Source]] = {
    "smallest": Source(SMALLEST, by_kind, 2),
    "large": Source(LARGE, of_the_last, 5),
    "rotary": Source(ROTARY, by_layer, 4),
    "experts": Source(made.MODELS["qwen3moe"], scattered, 3),
    "stacks": Source(made.MODELS["qwen3moe_stacked"], scattered, 3),
    "without a place": Source(made.MODELS["deepseek3"], dropped_last, 3),
    "latent": Source(made.MODELS["deepseek2"], scattered, 3),
    "linear": Source(made.MODELS["qwen35"], scattered, 3),
    "mxfp4": Source(made.MODELS["gpt_oss"], scales_first, 4),
    "fp8": Source(FP8, scales_first, 4),
}
TINY: Final = tuple(name for name in SOURCES if name != "large")


def write(name: str, parent: Path) -> Path:
    """The checkpoint of a row of SOURCES, in a folder of the name that its files have."""
    source, written = SOURCES[name], parent / "written"
    is_fp8 = source.case is FP8
    plain = checkpoints.write
    whole = sources.write_source(sources.CASES["fp8_block"], written) if is_fp8 else plain(source.case, written)
    tensors, config = sources.read_tensors(whole), json.loads((whole / "config.json").read_text())
    for tensor, stored in tensors.items():
        if tensor.endswith("_scales"):  # any others are none
            tensors[tensor] = Stored("U8", packed(tensor, stored.data.shape))
        elif is_fp8 and stored.data.shape[0] == config["vocab_size"]:
            tensors[tensor] = store_as(checkpoints.values(tensor, (BPE_TOKENS, stored.data.shape[1])), "BF16")
    out: Path = sources.write_tensors(
        parent / source.case.folder, tensors, source.place, {**config, "vocab_size": BPE_TOKENS}, source.shards
    )
    for file, data in checkpoints.side_files(source.case).items():
        if file != "config.json":
            (out / file).write_bytes(data)
    shutil.rmtree(written)
    return out


def recipe(name: str, max_part_bytes: int | None = None, file_type: str = "q4_k_m") -> Recipe:
    """What makes GGUF files of a row of SOURCES: one, or several of that size."""
    options = GgufOptions(max_part_bytes=max_part_bytes, tokenizer_pre=SOURCES[name].case.pre or "llama-bpe")
    return make_recipe(f"gguf:{file_type}", gguf=options)
