"""What a model is before any weight is read: shards, tensors and configuration, from headers only."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shardq.dequantize.base import Encoded


@dataclass(frozen=True, slots=True)
class TensorRef:
    """One named array of a checkpoint and where its bytes lie."""

    name: str
    shard: str  # file name of the shard, relative to the checkpoint's folder
    dtype: str | None  # safetensors tag ("BF16", "F16", "F32", "F8_E4M3", ...); None when only an index is known
    shape: tuple[int, ...] | None  # None when only an index is known
    begin: int  # offset of the first byte in the shard file; -1 when only an index is known
    end: int  # offset behind the last byte; -1 when only an index is known
    # How rows are made where they do not lie there as they are: of the matrix, or of each slice of a stack. Dtype and
    # shape are then those of the weight, begin and end those of its codes.
    encoded: "tuple[Encoded, ...]" = ()

    @property
    def size_bytes(self) -> int:
        """Bytes of data; 0 when only an index is known."""
        return self.end - self.begin

    @property
    def numel(self) -> int:
        """Number of elements; 0 when only an index is known."""
        if self.shape is None:
            return 0
        n = 1
        for d in self.shape:
            n *= d
        return n

    @property
    def module(self) -> str:
        """Name without its last part: `a.b` for `a.b.weight`, the name itself when it has one part."""
        return self.name.rpartition(".")[0] or self.name


@dataclass(frozen=True, slots=True)
class Shard:
    """One weight file."""

    name: str
    size_bytes: int
    sha256: str | None  # known for Hub files that are stored by content hash; None for a folder
    header_sha256: str | None  # of the JSON header bytes; None when only an index is known


@dataclass(frozen=True, slots=True)
class SideFile:
    """A file of the checkpoint's folder that is not a weight shard."""

    name: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model as files, pinned: nothing in it changes while a run lasts."""

    label: str  # "org/name" for the Hub, the folder's own name for a folder: safe to publish, never a full path
    commit: str | None  # 40 hex digits for the Hub, None for a folder
    shards: tuple[Shard, ...]  # in natural name order
    tensors: Mapping[str, TensorRef]  # in shard order, then file order
    config: Mapping[str, Any] | None  # parsed config.json; None when the checkpoint has none
    config_bytes: bytes | None  # config.json as it stands
    index_name: str | None  # file name of the index; None for a single file
    side_files: tuple[SideFile, ...]
    warnings: tuple[str, ...]  # what is odd but harmless, one sentence each
    peeked: Mapping[str, bytes] = field(default_factory=dict)  # content of small tensors: shapes, global scales
    texts: Mapping[str, bytes] = field(default_factory=dict)  # content of side files, for outputs that it goes into
