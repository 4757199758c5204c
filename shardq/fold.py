"""Folds: scales that were moved between neighbours so that fewer weights share a group with much larger ones, and how
large columns are, which tells what errors count. The model computes the same; what is quantized is another one. A fold
is found once (folding.py), and written down.

The file is a zstandard frame around a safetensors file. Its tensors are named for modules: a norm, or a matrix whose
rows are the columns of another one. Each has as many values as that has.

    exponents.NAME  I8   powers of two that the norm's weights, or the rows, are multiplied by, and columns divided by
    factors.NAME    F32  of norms that add one, in their place: what the columns behind are multiplied by
    sizes.NAME      I8   how large the columns behind are, in sixteenths of log2. Inputs of small ones are large, and an
                         error counts 2**(-power * size / 16) there
"""

import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Final

from shardq.checkpoint import Checkpoint
from shardq.errors import BadFold, CorruptShard, UnknownDtype
from shardq.files.atomic import reading, write_atomic
from shardq.files.safetensors import TensorSpec, parse_header, plan_file
from shardq.formats import STORAGE

FOLD: Final = "shardq-fold.zst"  # in an output
FORMAT: Final = "shardq-fold"
DTYPES: Final[Mapping[str, str]] = MappingProxyType({"exponents": "I8", "factors": "F32", "sizes": "I8"})
MAX_POWER: Final = 8
MAX_BYTES: Final = 1 << 30


@dataclass(frozen=True)
class Fold:
    """Scales and sizes by module, as they are stored."""

    exponents: Mapping[str, bytes]
    factors: Mapping[str, bytes]
    sizes: Mapping[str, bytes]
    power: int  # 1 to MAX_POWER
    source: str  # what `source_digest` says of the checkpoint that it was found in

    @property
    def modules(self) -> frozenset[str]:
        """All that it says something of."""
        return frozenset({*self.exponents, *self.factors, *self.sizes})

    def encode(self) -> bytes:
        """The safetensors file: the same bytes for equal folds."""
        arrays = {f"{kind}.{name}": data for kind, name, data in self._arrays()}
        specs = [
            TensorSpec(f"{kind}.{name}", DTYPES[kind], (8 * len(data) // STORAGE[DTYPES[kind]].bits,))
            for kind, name, data in self._arrays()
        ]
        plan = plan_file(specs, {"format": FORMAT, "power": str(self.power), "source": self.source})
        return plan.header + b"".join(arrays[name] for name in plan.offsets)

    def _arrays(self) -> Iterator[tuple[str, str, bytes]]:
        for kind, own in (("exponents", self.exponents), ("factors", self.factors), ("sizes", self.sizes)):
            yield from ((kind, name, data) for name, data in own.items())

    @cached_property
    def sha256(self) -> str:
        """Of the safetensors file, in hex."""
        return hashlib.sha256(self.encode()).hexdigest()


def write_fold(path: str | os.PathLike[str], fold: Fold) -> None:
    """Write a file, whole or not at all. Raises DiskFull, NotWritable."""
    write_atomic(Path(path), pack_fold(fold))


def pack_fold(fold: Fold) -> bytes:
    """The content of a file."""
    import zstandard

    return zstandard.ZstdCompressor(level=9).compress(fold.encode())


def read_fold(path: str | os.PathLike[str]) -> Fold:
    """The inverse of write_fold. Raises BadFold, SourceUnreadable."""
    with reading(path):
        data = Path(path).read_bytes()
    return unpack_fold(data, os.path.basename(path))


def unpack_fold(data: bytes, label: str) -> Fold:
    """The inverse of pack_fold; `label` is for messages. Raises BadFold."""
    import zstandard

    try:
        raw = zstandard.ZstdDecompressor().decompress(data, max_output_size=MAX_BYTES)
        header = parse_header(raw, len(raw), label)
    except (zstandard.ZstdError, CorruptShard, UnknownDtype) as e:
        raise BadFold(f"fold {label} cannot be read ({e}): expected a file that --fold auto has written") from e
    power = header.metadata.get("power", "")
    if header.metadata.get("format") != FORMAT or power not in map(str, range(1, MAX_POWER + 1)):
        raise BadFold(f"fold {label} holds something else: expected format {FORMAT!r} and a power in its metadata")
    found: dict[str, dict[str, bytes]] = {kind: {} for kind in DTYPES}
    for t in header.tensors:
        kind, _, name = t.name.partition(".")
        if DTYPES.get(kind) != t.dtype or len(t.shape) != 1:
            raise BadFold(f"fold {label}, {t.name}: expected one dimension of exponents, factors or sizes")
        found[kind][name] = raw[t.begin : t.end]
    return Fold(found["exponents"], found["factors"], found["sizes"], int(power), header.metadata.get("source", ""))


def source_digest(checkpoint: Checkpoint) -> str:
    """Tells a checkpoint from others of the same family: sha256 of its shards' sizes and headers, in hex."""
    said = [(s.name, s.size_bytes, s.sha256, s.header_sha256) for s in checkpoint.shards]
    return hashlib.sha256(repr(said).encode()).hexdigest()
