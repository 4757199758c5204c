"""A tiny checkpoint for the tests of GGUF models, as a value and as a folder."""

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
from gguf_shapes_made import Shapes
from numpy.typing import NDArray

Stored = tuple[tuple[int, ...], str, bytes]  # shape, type and bytes of a tensor
GOLDEN = Path(__file__).parent / "golden_gguf_model"


@dataclass(frozen=True)
class Case:
    """One checkpoint. `tokenizer` are files of GOLDEN by the names that they get; `texts` further files."""

    config: Mapping[str, Any]
    shapes: Shapes
    tokenizer: Mapping[str, str]
    pre: str | None = None
    texts: Mapping[str, str] | None = None
    folder: str = "Tiny-Model-1B-Instruct-v1.2"


def values(name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Numbers that differ between tensors and rows, and that BF16 holds."""
    count = int(np.prod(shape, dtype=int))
    mixed = (np.arange(count, dtype=np.uint64) * np.uint64(2654435761) + np.uint64(crc32(name.encode()))) >> np.uint64(
        7
    )
    return ((mixed % np.uint64(255)).astype(np.float32).reshape(shape) - np.float32(127)) / np.float32(128)


def is_packed(name: str) -> bool:
    return name.endswith(("_blocks", "_scales"))


def codes(name: str, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    return (values(name, shape) * 128 + 127).astype(np.uint8)


def side_files(case: Case) -> dict[str, bytes]:
    found = {name: (GOLDEN / stored).read_bytes() for name, stored in case.tokenizer.items()}
    found |= {name: text.encode() for name, text in (case.texts or {}).items()}
    return {"config.json": json.dumps(case.config).encode(), **found}


def write(case: Case, parent: Path) -> Path:
    """The checkpoint as a folder with one shard, in BF16."""
    folder = parent / case.folder
    folder.mkdir(parents=True)
    for name, data in side_files(case).items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)
    shard: dict[str, Stored] = {}
    for name, shape in case.shapes.items():
        data = codes(name, shape).tobytes() if is_packed(name) else bf16(values(name, shape))
        shard[name] = (shape, "U8" if is_packed(name) else "BF16", data)
    write_shard(folder / "model.safetensors", shard)
    return folder


def write_shard(path: Path, tensors: Mapping[str, Stored]) -> None:
    header, end = {}, 0
    for name, (shape, kind, data) in tensors.items():
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [end, end + len(data)]}
        end += len(data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(b"".join((struct.pack("<Q", len(text)), text, *(data for _, _, data in tensors.values()))))


def bf16(data: NDArray[np.float32]) -> bytes:
    """As BF16, to the nearest even; not for NaN."""
    bits = np.ascontiguousarray(data).view(np.uint32).astype(np.uint64)
    return (
        ((bits + np.uint64(0x7FFF) + ((bits >> np.uint64(16)) & np.uint64(1))) >> np.uint64(16)).astype("<u2").tobytes()
    )
