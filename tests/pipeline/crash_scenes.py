"""What a sweep runs: a source, an output folder, and the call that makes one from the other.

A scene is a row of SCENES: a function from the disk's folder and an untouched checkpoint to a `Scene`. To sweep another
kind of run, add a row.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from unittest.mock import patch

import shardq
from shardq.sources.base import SourceFile
from shardq.sources.demo import DemoSource

SHARDS: Final = "*.safetensors"


@dataclass(frozen=True, slots=True)
class Scene:
    """One kind of run. All that may be lost lies below `disk`."""

    disk: Path
    out: Path
    prepare: Callable[[], None]  # makes the disk what it is before the first run
    run: Callable[[], object]  # may be repeated until it says that it is done
    only_here: Mapping[str, Path]  # shards with no other copy, and where they are before the first run


def keeping(disk: Path, original: Path) -> Scene:
    """A folder that is read in place."""
    out = disk / "out"

    def run() -> object:
        return shardq.quantize(original, output_dir=out, limits=shardq.Limits(parallel=1))

    return Scene(disk, out, lambda: _clear(disk), run, {})


def eating(disk: Path, original: Path) -> Scene:
    """A folder whose shards are deleted on the way."""
    source, out = disk / original.name, disk / "out"
    shards = {p.relative_to(original).as_posix() for p in original.rglob(SHARDS)}

    def prepare() -> None:
        _clear(disk)
        shutil.copytree(original, source)

    def run() -> object:
        return shardq.quantize(source, output_dir=out, limits=shardq.Limits(parallel=1, delete_source=True))

    return Scene(disk, out, prepare, run, {n: source / n for n in shards})


def nested(disk: Path, original: Path) -> Scene:
    """As `eating`, but the shards lie in a folder of the checkpoint."""
    source = disk.parent / "nested"
    (source / "parts").mkdir(parents=True)
    for path in original.iterdir():
        shutil.copy(path, source / "parts" if path.match(SHARDS) else source)
    index = source / "model.safetensors.index.json"
    record = json.loads(index.read_text())
    record["weight_map"] = {tensor: f"parts/{shard}" for tensor, shard in record["weight_map"].items()}
    index.write_text(json.dumps(record))
    return eating(disk, source)


def fetching(disk: Path, original: Path) -> Scene:
    """A remote source, fetched into the staging folder by threads: the demo, but as small as the others."""
    out = disk / "out"
    held = {p.name: p.read_bytes() for p in original.iterdir()}
    listing = tuple(SourceFile(n, len(b), hashlib.sha256(b).hexdigest()) for n, b in sorted(held.items()))

    def run() -> object:
        with patch("shardq.sources.demo.open_demo", lambda: DemoSource(held, listing)):
            return shardq.quantize("demo", output_dir=out, limits=shardq.Limits(parallel=1))

    return Scene(disk, out, lambda: _clear(disk), run, {})


def several(disk: Path, original: Path) -> Scene:
    """Two outputs from a folder that is read in place, one with scales that tensors of both shards share."""
    source, outs = disk.parent / "shared", disk / "outs"
    source.mkdir()
    for path in original.iterdir():
        shutil.copy(path, source)
    for path in source.iterdir():  # the only matrices of two shards become what one layer runs as one; names as long
        data = path.read_bytes().replace(b"layers.0.self_attn.o_proj", b"layers.0.self_attn.q_proj")
        path.write_bytes(data.replace(b"layers.1.self_attn.o_proj", b"layers.0.self_attn.k_proj"))

    def run() -> object:
        schemes = ("W4A16@gptq", "NVFP4A16")
        return shardq.quantize_many(source, schemes, output_dir=outs, limits=shardq.Limits(parallel=1))

    return Scene(disk, outs, lambda: _clear(disk), run, {})


SCENES: Final[Mapping[str, Callable[[Path, Path], Scene]]] = {
    "keeping": keeping,
    "eating": eating,
    "nested": nested,
    "fetching": fetching,
    "several": several,
}


def _clear(disk: Path) -> None:
    shutil.rmtree(disk, ignore_errors=True)
    disk.mkdir()
