"""Whole checkpoints of quantized and stacked sources in folders, their twins, and their tensors in other shards.

`CASES` has them all."""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import numpy as np
from encoded_experts import SINGLE_EXPERTS, STACKED
from encoded_models import DENSE, Case, build
from encoded_numbers import Stored, store_as

from shardq.files.safetensors import TensorSpec, plan_file, read_header
from shardq.formats import STORAGE

CASES: Final[Mapping[str, Case]] = MappingProxyType({c.id: c for c in (*DENSE, *STACKED, *SINGLE_EXPERTS)})
INDEX: Final = "model.safetensors.index.json"
QUANTIZATION: Final = ("quantization_config", "quantization", "expert_dtype")  # keys that a twin's config.json lacks
# Tensors that only have meaning beside codes.
COMPANION: Final = re.compile(
    r"(scales?|scale_?(inv|2)|amax|zeros|zero_point|biases|g_idx|shape|absmax|SCB|quant_map|bitsandbytes__\w+|_format)$"
)
LAYER: Final = re.compile(r"layers\.(\d+)\.")
Place = Callable[[str], int]  # name of a tensor -> number of its shard, from 1


def write_source(case: Case, folder: Path) -> Path:
    """The checkpoint: a shard for each layer and one for what stands behind them; embeddings are in the first."""
    tensors = {name: t for piece in build(case) for name, t in piece.source.items()}
    layers = 1 + max(_layer(name, 0) for name in tensors)
    write_tensors(folder, tensors, lambda name: 1 + _layer(name, 0 if "embed" in name else layers), case.config)
    for name, content in case.side_files.items():
        (folder / name).write_text(json.dumps(content))
    return folder


def write_twin(case: Case, source: Path, out: Path, dtype: str | None = "F32") -> Path:
    """The same model, not quantized, and each expert's matrices for themselves; `source` is a folder that holds `case`.

    A weight lies in the shard of its codes. Weights that were encoded are stored as `dtype`; None: the type that the
    kind's own reader makes of them. What was not encoded has its own type.
    """
    shard_of = {name: _number(shard) for name, shard in _weight_map(source).items()}
    tensors, places = {}, {}
    for piece in build(case):
        for name, t in piece.twin.items():
            rounded = piece.encoded and t.dtype == "F32"
            tensors[name] = store_as(t.data, dtype or case.dtype) if rounded else t
            places[name] = shard_of[next(iter(piece.source))]
    config = {k: v for k, v in case.config.items() if k not in QUANTIZATION}
    return write_tensors(out, tensors, places.__getitem__, config, max(shard_of.values()))


def scatter(folder: Path, out: Path, place: Place, shards: int) -> Path:
    """The checkpoint in `folder` with its tensors in other shards; those that get none are not there."""
    config = json.loads((folder / "config.json").read_text())
    write_tensors(out, read_tensors(folder), place, config, shards)
    for path in folder.iterdir():
        if path.suffix == ".json" and not (out / path.name).exists():
            (out / path.name).write_bytes(path.read_bytes())
    return out


def read_tensors(folder: Path) -> dict[str, Stored]:
    """All tensors of a checkpoint."""
    return {name: t for path in sorted(folder.glob("*.safetensors")) for name, t in _read(path).items()}


# --- ready-made places ---------------------------------------------------------------------------------------------


def scales_first(name: str) -> int:
    """Companions in the first shard, codes in the last, and all else between them."""
    if COMPANION.search(name):
        return 1
    return 3 if LAYER.search(name) else 2


def gate_and_up_apart(name: str) -> int:
    """Members of a fused group in different shards, each beside its companions; stacks apart from their partners."""
    found = re.search(r"\.(gate_proj|k_proj|w1|gate_up_proj|input_linear|w13_)|\.(up_proj|q_proj|w3)", name)
    return 2 if found is None else 1 if found[1] else 3


def donor_cycle(name: str) -> int:
    """Two shards, each with the companions of the other's codes."""
    return 1 + (_layer(name, 0) + bool(COMPANION.search(name))) % 2


def numbers_apart(name: str) -> int:
    """What stands above the scales in the second of three shards, scales in the first, codes in the last; biases of
    experts beside the former."""
    leaf = name.rpartition(".")[2]
    if leaf in ("scale2", "weight_scale_2", "weight_global_scale", "qzeros", "quant_map") or leaf.endswith("_bias"):
        return 2
    return scales_first(name)


PLACES: Final[Mapping[str, tuple[Place, int]]] = MappingProxyType(
    {
        "scales_first": (scales_first, 3),
        "gate_and_up_apart": (gate_and_up_apart, 3),
        "donor_cycle": (donor_cycle, 2),
        "numbers_apart": (numbers_apart, 3),
    }
)


# --- files ---------------------------------------------------------------------------------------------------------


def _layer(name: str, without: int) -> int:
    found = LAYER.search(name)
    return int(found[1]) if found else without


def _number(shard: str) -> int:
    return int(shard.split("-")[1])


def _weight_map(folder: Path) -> Mapping[str, str]:
    found: Mapping[str, str] = json.loads((folder / INDEX).read_text())["weight_map"]
    return found


def write_tensors(
    folder: Path, tensors: Mapping[str, Stored], place: Place, config: Mapping[str, Any], shards: int | None = None
) -> Path:
    """Tensors as a checkpoint: each in the shard of the number that `place` gives, of so many."""
    folder.mkdir(parents=True)
    by_shard: dict[int, list[str]] = {}
    for name in tensors:
        by_shard.setdefault(place(name), []).append(name)
    count = shards or max(by_shard)
    weight_map: dict[str, str] = {}
    for number, names in sorted(by_shard.items()):
        shard = f"model-{number:05d}-of-{count:05d}.safetensors"
        weight_map |= dict.fromkeys(names, shard)
        (folder / shard).write_bytes(_content({n: tensors[n] for n in names}))
    total = sum(t.data.nbytes for t in tensors.values())
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True))
    (folder / "tokenizer.json").write_text("{}")
    return folder


def _content(tensors: Mapping[str, Stored]) -> bytes:
    plan = plan_file([TensorSpec(name, t.dtype, t.data.shape) for name, t in tensors.items()])
    data = bytearray(plan.size_bytes)
    data[: len(plan.header)] = plan.header
    for name, (begin, end) in plan.offsets.items():
        data[begin:end] = np.ascontiguousarray(tensors[name].data).tobytes()
    return bytes(data)


def _read(path: Path) -> dict[str, Stored]:
    """Every element as a pattern of its own width."""
    content = path.read_bytes()
    found = {}
    for t in read_header(path).tensors:
        width = STORAGE[t.dtype].bits // 8
        data = np.frombuffer(content, f"<u{width}", (t.end - t.begin) // width, t.begin)
        found[t.name] = Stored(t.dtype, data.reshape(t.shape))
    return found
