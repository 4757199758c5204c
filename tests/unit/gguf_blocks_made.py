"""GGUF files as other tools would write them: any numbers, or blocks, under any names."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shardq.files.gguf import GgufSpec, KeyValue, plan_gguf
from shardq.ggml import GGML

Tensors = Mapping[str, tuple[str, NDArray[Any]]]  # name -> type, bytes or numbers [rows, columns of bytes or numbers]


def write_gguf(path: Path, tensors: Tensors, architecture: str = "llama") -> Path:
    """A file as another tool would write it."""
    pairs = (KeyValue("general.architecture", "string", architecture),)
    specs = []
    for name, (kind, data) in tensors.items():
        columns = data.nbytes // len(data) // GGML[kind].block_bytes * GGML[kind].block_weights
        specs.append(GgufSpec(name, kind, (columns, len(data))))
    plan = plan_gguf(pairs, specs)
    whole = bytearray(plan.size_bytes)
    whole[: len(plan.header)] = plan.header
    for name, (begin, end) in plan.offsets.items():
        whole[begin:end] = tensors[name][1].tobytes()
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_bytes(whole)
    return path


def random_blocks(kind: str, rows: int, columns: int) -> NDArray[np.uint8]:
    """Blocks with small scales, wherever these are."""
    count = columns // GGML[kind].block_weights * GGML[kind].block_bytes
    data = np.random.default_rng(GGML[kind].id).integers(0, 0x30, (rows, count), np.uint8)
    return data + 96 if kind == "MXFP4" else data
