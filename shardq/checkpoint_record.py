"""A checkpoint's headers as bytes: kept in the staging folder when source shards are deleted on the way, because a
resumed run could not read them again."""

import base64
import json
from dataclasses import asdict
from typing import Any

import zstandard

from shardq.checkpoint import Checkpoint, Shard, SideFile, TensorRef


def encode_checkpoint(c: Checkpoint) -> bytes:
    """Compressed JSON."""
    record = {
        "label": c.label,
        "commit": c.commit,
        "shards": [asdict(s) for s in c.shards],
        "tensors": [[t.name, t.shard, t.dtype, t.shape, t.begin, t.end] for t in c.tensors.values()],
        "config": None if c.config_bytes is None else base64.b64encode(c.config_bytes).decode(),
        "index_name": c.index_name,
        "side_files": [asdict(f) for f in c.side_files],
        "warnings": list(c.warnings),
        "peeked": {n: base64.b64encode(data).decode() for n, data in c.peeked.items()},
        "texts": {n: base64.b64encode(data).decode() for n, data in c.texts.items()},
    }
    return zstandard.ZstdCompressor().compress(json.dumps(record).encode())


def decode_checkpoint(data: bytes) -> Checkpoint:
    """The inverse of encode_checkpoint."""
    r: dict[str, Any] = json.loads(zstandard.ZstdDecompressor().decompress(data))
    config = None if r["config"] is None else base64.b64decode(r["config"])
    tensors = (
        TensorRef(name, shard, dtype, None if shape is None else tuple(shape), begin, end)
        for name, shard, dtype, shape, begin, end in r["tensors"]
    )
    return Checkpoint(
        label=r["label"],
        commit=r["commit"],
        shards=tuple(Shard(**s) for s in r["shards"]),
        tensors={t.name: t for t in tensors},
        config=None if config is None else json.loads(config),
        config_bytes=config,
        index_name=r["index_name"],
        side_files=tuple(SideFile(**f) for f in r["side_files"]),
        warnings=tuple(r["warnings"]),
        peeked={n: base64.b64decode(data) for n, data in r["peeked"].items()},
        texts={n: base64.b64decode(data) for n, data in r["texts"].items()},
    )
