"""Codes that were tuned beside an output, for the main job to pack: a folder with a safetensors file for each block."""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from shardq.errors import CorruptShard, OutputOccupied, RecipeChanged
from shardq.files.atomic import reading, sync_way, write_atomic, writing
from shardq.files.safetensors import TensorSpec, plan_file, read_header
from shardq.quantizers.quantized import Quantized

if TYPE_CHECKING:
    from numpy.typing import NDArray

IDENTITY: Final = "identity.json"
MANIFEST: Final = "tuned.json"
FORMAT: Final = "shardq-tuned"
SUFFIX: Final = ".safetensors"
_TAGS: Final[dict[str, "np.dtype[Any]"]] = {"U8": np.dtype(np.uint8), "F32": np.dtype("<f4")}
_PARTS: Final = ("codes", "scales", "zeros", "biases", "global_scale")


@dataclass(frozen=True, slots=True)
class Tuned:
    """What became of one module."""

    scheme: str  # Scheme.name
    quantized: Quantized


class TunedWriter:
    """Writes a folder, block by block; what an earlier run has finished stays."""

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        """Makes the folder. Raises RecipeChanged if it holds another identity, OutputOccupied if it is something
        else's."""
        self.folder = folder
        text = json.dumps(identity, sort_keys=True, indent=1).encode()
        with writing(folder):
            os.makedirs(folder, exist_ok=True)
            sync_way(folder)
        path = folder / IDENTITY
        if not path.exists():
            if any(folder.iterdir()):
                raise OutputOccupied(f"{folder} is there and holds no tuned codes: choose another output folder")
            write_atomic(path, text)
            return
        before = read_identity(folder)
        after = json.loads(text)
        changed = sorted(k for k in {*before, *after} if before.get(k) != after.get(k))
        if changed:
            raise RecipeChanged(
                f"{folder} was begun with another {', '.join(changed)}: give the same words, or delete the folder"
            )

    def has(self, block: str) -> bool:
        """True if an earlier run, or this one, has finished it."""
        return (self.folder / f"{block}{SUFFIX}").exists()

    def write(self, block: str, modules: Mapping[str, Tuned]) -> None:
        """Put a block's file in place, whole and durable. Raises DiskFull, NotWritable."""
        arrays: dict[str, NDArray[Any]] = {}
        for module, tuned in modules.items():
            q = tuned.quantized
            found = {"codes": q.codes, "scales": q.scales, "zeros": q.zeros, "biases": q.biases}
            arrays |= {f"{module}.{part}": np.ascontiguousarray(a) for part, a in found.items() if a is not None}
            if q.global_scale is not None:
                arrays[f"{module}.global_scale"] = np.array([q.global_scale], "<f4")
        specs = [TensorSpec(n, "U8" if a.dtype == np.uint8 else "F32", a.shape) for n, a in arrays.items()]
        schemes = json.dumps({m: t.scheme for m, t in modules.items()}, sort_keys=True)
        plan = plan_file(specs, {"format": FORMAT, "schemes": schemes})
        write_atomic(
            self.folder / f"{block}{SUFFIX}", plan.header + b"".join(arrays[name].tobytes() for name in plan.offsets)
        )

    def finish(self) -> None:
        """Write the manifest: files and their sha256."""
        files = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(self.folder.glob(f"*{SUFFIX}"))}
        write_atomic(self.folder / MANIFEST, json.dumps({"format": FORMAT, "files": files}, indent=1).encode())


def read_identity(folder: Path) -> dict[str, Any]:
    """What a folder was begun with."""
    with reading(folder / IDENTITY):
        found: dict[str, Any] = json.loads((folder / IDENTITY).read_bytes())
    return found


def read_tuned(folder: Path, block: str) -> dict[str, Tuned]:
    """What a finished block's file holds, by module. Raises SourceUnreadable, CorruptShard."""
    path = folder / f"{block}{SUFFIX}"
    header = read_header(path)
    with reading(path):
        data = path.read_bytes()
    if header.metadata.get("format") != FORMAT:
        raise CorruptShard(f"{path} holds no tuned codes; delete the folder and tune again")
    schemes: dict[str, str] = json.loads(header.metadata["schemes"])
    arrays = {t.name: np.frombuffer(data[t.begin : t.end], _TAGS[t.dtype]).reshape(t.shape) for t in header.tensors}
    found = {}
    for module, scheme in schemes.items():
        codes, scales, zeros, biases, whole = (arrays.get(f"{module}.{part}") for part in _PARTS)
        assert codes is not None
        assert scales is not None
        found[module] = Tuned(
            scheme, Quantized(codes, scales, zeros, biases, None if whole is None else float(whole[0]))
        )
    return found
