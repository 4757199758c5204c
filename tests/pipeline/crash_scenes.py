"""What a sweep runs: a source, an output folder, and the call that makes one from the other.

A scene is a row of SCENES: a function from the disk's folder and an untouched checkpoint to a `Scene`. To sweep another
kind of run, add a row.
"""

import hashlib
import json
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final
from unittest.mock import patch

import shardq
from shardq.sources.base import SourceFile
from shardq.sources.demo import DemoSource
from shardq.tuned import MANIFEST, load_tuned

sys.path.append(str(Path(__file__).parents[1] / "unit"))
import gguf_sources

SHARDS: Final = "*.safetensors"
PART_BYTES: Final = 22_000  # so that both shards of gguf_sources' smallest model write into some part


def _verify(out: Path) -> Sequence[str]:
    return shardq.verify(out, deep=True).problems


@dataclass(frozen=True, slots=True)
class Scene:
    """One kind of run. All that may be lost lies below `disk`."""

    disk: Path
    out: Path
    prepare: Callable[[], None]  # makes the disk what it is before the first run
    run: Callable[[], object]  # may be repeated until it says that it is done
    only_here: Mapping[str, Path]  # shards with no other copy, and where they are before the first run
    begins: str = "config.json"  # the output's file without which nothing loads: it comes last
    check: Callable[[Path], Sequence[str]] = _verify  # what is wrong with a finished folder
    passing: tuple[str, ...] = ()  # files whose content is of no use to anybody once all is done


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


def fetching(disk: Path, original: Path, recipe: str | shardq.Recipe = "W4A16") -> Scene:
    """A remote source, fetched into the staging folder by threads: the demo, but as small as the others."""
    out = disk / "out"
    held = {p.name: p.read_bytes() for p in original.iterdir()}
    listing = tuple(SourceFile(n, len(b), hashlib.sha256(b).hexdigest()) for n, b in sorted(held.items()))

    def run() -> object:
        with patch("shardq.sources.demo.open_demo", lambda: DemoSource(held, listing)):
            return shardq.quantize("demo", recipe, output_dir=out, limits=shardq.Limits(parallel=1))

    with patch("shardq.sources.demo.open_demo", lambda: DemoSource(held, listing)):
        begins = _first_of(shardq.plan("demo", recipe))
    return Scene(disk, out, lambda: _clear(disk), run, {}, begins)


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


def gguf(disk: Path, _original: Path, part_bytes: int | None, eats: bool) -> Scene:
    """A GGUF file of two shards, or several. With `eats` the shards are deleted, each when it is settled."""
    written = gguf_sources.write("smallest", disk.parent / "gguf")
    source, out = disk / written.name, disk / "out"
    recipe = gguf_sources.recipe("smallest", part_bytes)

    def prepare() -> None:
        _clear(disk)
        if eats:
            shutil.copytree(written, source)

    def run() -> object:
        limits = shardq.Limits(parallel=1, delete_source=eats)
        return shardq.quantize(source if eats else written, recipe, output_dir=out, limits=limits)

    shards = [p.name for p in written.glob(SHARDS)]
    begins = _first_of(shardq.plan(written, recipe))
    return Scene(disk, out, prepare, run, {n: source / n for n in shards} if eats else {}, begins)


def gguf_beside(disk: Path, _original: Path) -> Scene:
    """Two GGUF outputs of other file types, one in parts, and shards of safetensors, from one read."""
    written, outs = gguf_sources.write("smallest", disk.parent / "gguf"), disk / "outs"
    recipes = [
        gguf_sources.recipe("smallest", PART_BYTES), shardq.make_recipe("W4A16", group_size=32),
        gguf_sources.recipe("smallest", None, "q8_0"),
    ]  # fmt: skip

    def run() -> object:
        return shardq.quantize_many(written, recipes, output_dir=outs, limits=shardq.Limits(parallel=1))

    return Scene(disk, outs, lambda: _clear(disk), run, {})


def gguf_fetching(disk: Path, _original: Path) -> Scene:
    """A GGUF file of a remote source."""
    return fetching(disk, gguf_sources.write("smallest", disk.parent / "gguf"), gguf_sources.recipe("smallest"))


def tuning(disk: Path, original: Path) -> Scene:
    """Codes of a model, tuned block by block, with what transformers needs to make its blocks."""
    from shardq.tune.driver import LOCK
    from shardq.tune.options import build_options

    out = disk / "out"
    options = build_options({"algorithm": "gptq", "dataset": "random", "nsamples": 2, "seqlen": 8})

    def run() -> object:
        return shardq.tune_model(original, shardq.make_recipe("W4A16G32"), out, options=options)

    def check(folder: Path) -> Sequence[str]:
        load_tuned(folder)
        return ()

    return Scene(disk, out, lambda: _clear(disk), run, {}, MANIFEST, check, (LOCK,))


SCENES: Final[Mapping[str, Callable[[Path, Path], Scene]]] = {
    "keeping": keeping,
    "eating": eating,
    "nested": nested,
    "fetching": fetching,
    "several": several,
    "gguf parts": partial(gguf, part_bytes=PART_BYTES, eats=True),
    "gguf": partial(gguf, part_bytes=None, eats=True),
    "gguf fetching": gguf_fetching,
    "gguf beside": gguf_beside,
    "tuning": tuning,
}


def _first_of(plan: shardq.Plan) -> str:
    return plan.files[0].name if plan.gguf else "config.json"


def _clear(disk: Path) -> None:
    shutil.rmtree(disk, ignore_errors=True)
    disk.mkdir()
