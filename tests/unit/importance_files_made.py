"""Files of importance for the tests: makers of the two formats of llama.cpp, and a reader of all of one."""

import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shardq.files.safetensors import TensorSpec, plan_file
from shardq.importance import load_importance, match
from shardq.importance_files import Provenance
from shardq.importance_vectors import read_vector

Floats = NDArray[np.float32]
L0 = "model.layers.0"
RANDOM = Provenance("random ids", 64, 7, "org/tiny", "0" * 40)
OWN: dict[str, Floats] = {
    f"{L0}.self_attn.{{q_proj,k_proj,v_proj}}": np.array([1, 2, 3, 4], np.float32),
    f"{L0}.self_attn.o_proj": np.array([5, 0, 7], np.float32),
    f"{L0}.mlp.experts.*.{{gate_proj,up_proj}}": np.array([9, 8, 7, 6], np.float32),
    f"{L0}.mlp.experts.0.down_proj": np.array([1, 1], np.float32),
    f"{L0}.mlp.experts.1.down_proj": np.array([2, 3], np.float32),
}
MODULES = {
    f"{L0}.self_attn.q_proj": (4, 4),
    f"{L0}.self_attn.v_proj": (2, 4),
    f"{L0}.self_attn.o_proj": (4, 3),
    f"{L0}.mlp.experts.1.gate_proj": (2, 4),
    f"{L0}.mlp.experts.1.down_proj": (4, 2),
}


# --- makers of the two formats of llama.cpp ------------------------------------------------------------------------


def text(value: str, code: str) -> bytes:
    return struct.pack(code, len(value.encode())) + value.encode()


def legacy(entries: Mapping[str, tuple[int, Sequence[float]]], tail: bytes = b"") -> bytes:
    """`save_imatrix_legacy`: name -> calls, values times calls."""
    out = struct.pack("<i", len(entries))
    for name, (calls, values) in entries.items():
        out += text(name, "<i") + struct.pack("<ii", calls, len(values)) + np.array(values, "<f4").tobytes()
    return out + tail


def pair(key: str, kind: int, value: bytes) -> bytes:
    return text(key, "<Q") + struct.pack("<I", kind) + value


PAIRS = (
    pair("general.type", 8, text("imatrix", "<Q")),
    pair("imatrix.datasets", 9, struct.pack("<IQ", 8, 1) + text("/home/me/calibration.txt", "<Q")),
    pair("imatrix.chunk_count", 4, struct.pack("<I", 10)),
    pair("imatrix.chunk_size", 4, struct.pack("<I", 512)),
)


def gguf(
    stats: Mapping[str, tuple[Any, Any]], pairs: Sequence[bytes] = PAIRS, alignment: int = 32, version: int = 3
) -> bytes:
    """`save_imatrix`: name -> sums [slices, columns], counts [slices]."""
    infos, data = b"", b""
    tensors = 0
    for name, (sums, counts) in stats.items():
        for suffix, array in (("in_sum2", np.atleast_2d(sums)), ("counts", np.reshape(counts, (-1, 1)))):
            infos += text(f"{name}.{suffix}", "<Q") + struct.pack("<IQQIQ", 2, *array.shape[::-1], 0, len(data))
            data += array.astype("<f4").tobytes()
            data += bytes(-len(data) % alignment)
            tensors += 1
    head = b"GGUF" + struct.pack("<IQQ", version, tensors, len(pairs)) + b"".join(pairs) + infos
    return head + bytes(-len(head) % alignment) + data


def put(folder: Path, data: bytes) -> Path:
    path = folder / "stats.dat"
    path.write_bytes(data)
    return path


def vectors(path: Path, modules: Mapping[str, tuple[int, int]]) -> dict[str, list[float]]:
    return {m: read_vector(v).tolist() for m, v in match(load_importance(path), modules).items()}


def own_file(values: Mapping[str, Any], metadata: Mapping[str, str] | None = None, dtype: str = "F32") -> bytes:
    arrays = {n: np.asarray(v, "<f4") for n, v in values.items()}
    said = {"format": "shardq-importance", "format_version": "1", "data": "text"} | dict(metadata or {})
    plan = plan_file([TensorSpec(n, dtype, a.shape) for n, a in arrays.items()], said)
    return plan.header + b"".join(arrays[n].tobytes() for n in plan.offsets)
