"""Range mode with quantized sources under caps of disk and memory, measured."""

import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import encoded_models as models
import encoded_sources as sources
import encoded_streams as streams
import pytest
from encoded_kinds import ROWS

import shardq
from shardq import Limits
from shardq.errors import BudgetTooSmall
from shardq.files.safetensors import TensorSpec, plan_file
from shardq.needs import disk_bytes
from shardq.onepass import OnePass
from shardq.reports import describe_needs
from shardq.spans import largest_span_bytes
from shardq.traffic import lent_bytes

MakeModel = Callable[[Path], Any]
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory without a name is there on Linux only")


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of some MB, with a scale for each 16 weights, so that blocks and records are small against them."""
    kind = next(k for k in ROWS if k.id == "nvfp4_ct")
    layers = range(4)
    case = replace(
        streams.CASES["nvfp4_ct"],
        config={**streams.CASES["nvfp4_ct"].config, "num_hidden_layers": len(layers), "hidden_size": 1024},
        pieces=lambda: (p for n in layers for p in models.mlp(f"model.layers.{n}.mlp", 1024, 1024, kind.encode)),
    )
    folder: Path = sources.write_source(case, tmp_path_factory.mktemp("wide") / "model")
    return folder


def cycle(name: str) -> int:
    """Each shard has the scales of the one before it."""
    layer = int(sources.LAYER.search(name)[1])
    return 1 + (layer + bool(sources.COMPANION.search(name))) % 4


def scales_last(name: str) -> int:
    """The first shards wait for the last one."""
    return 5 if sources.COMPANION.search(name) else 1 + int(sources.LAYER.search(name)[1])


def beside(name: str) -> int:
    """Each layer in a shard of its own."""
    return 1 + int(sources.LAYER.search(name)[1])


@pytest.mark.parametrize("push", [False, True])
@pytest.mark.parametrize(("place", "count"), [(beside, 4), (cycle, 4), (scales_last, 5)])
def test_disk_stays_below_the_least_cap(
    wide: Path, place: Any, count: int, push: bool, push_hub: Any, host_model: Callable[[Path], str], tmp_path: Path,
    short_spans: int, measures: ModuleType,
) -> None:  # fmt: skip
    source = host_model(sources.scatter(wide, tmp_path / "spread" / "model", place, count))
    work, out = OnePass((shardq.plan(source),)), tmp_path / "out"
    cap = disk_bytes(work, staged=False, uploads=push, streamed=True)
    lent = sum(loan.disk_bytes for own in work.loans.values() for loan in own)
    bare = disk_bytes(work, staged=False, uploads=push)
    assert bare < cap <= bare + lent
    assert describe_needs(work)["disk"]["push_stream" if push else "stream"] == cap
    peaks = {"all": 0, "lent": 0}
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.001):
            peaks["all"] = max(peaks["all"], measures.used_bytes(out))
            peaks["lent"] = max(peaks["lent"], measures.used_bytes(out / ".shardq" / "lent"))

    def quantize(cap: int) -> None:
        limits = Limits(parallel=1, max_disk_bytes=cap, stream=True)
        shardq.quantize(source, output_dir=out, limits=limits, push_to="me/small" if push else None)

    with pytest.raises(BudgetTooSmall, match="--max-disk"):
        quantize(cap - 1)
    thread = threading.Thread(target=watch)
    thread.start()
    try:
        quantize(cap)
    finally:
        over.set()
        thread.join()
    assert cap * 0.7 < peaks["all"] <= cap
    assert 0 < peaks["lent"] <= lent
    expected = streams.local(tmp_path / "spread" / "model", tmp_path / "local")
    made = push_hub.files("me/small") if push else streams.shards(out)
    assert {n: d for n, d in made.items() if n.endswith(".safetensors")} == expected


def test_refusal_of_a_staged_run_says_what_range_mode_needs(
    wide: Path, push_hub: Any, host_model: Callable[[Path], str], tmp_path: Path, short_spans: int
) -> None:
    source = host_model(sources.scatter(wide, tmp_path / "spread" / "model", scales_last, 5))
    work = OnePass((shardq.plan(source),))
    with pytest.raises(BudgetTooSmall, match=r"([\d.]+) MB with --stream") as refused:
        shardq.quantize(source, output_dir=tmp_path / "out", limits=Limits(parallel=1, max_disk_bytes=1_000))
    named = re.search(r"([\d.]+) MB with --stream", str(refused.value))
    assert named is not None
    least = disk_bytes(work, staged=False, uploads=False, streamed=True)
    assert least <= round(float(named[1]) * 1_000_000) < least + 10_000


def test_memory_of_the_whole_tree_stays_below_the_cap(
    make_model: MakeModel, tmp_path: Path, measures: ModuleType
) -> None:
    """With pieces of real size, and more to be borrowed than the lender may hold."""
    folder = tmp_path / "giant"
    folder.mkdir()
    config = {**streams.CASES["nvfp4_ct"].config, "num_hidden_layers": 1}
    rows, columns = {"up_proj": 49_152, "gate_proj": 4_096}, 4096
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, n in rows.items():
        module = f"model.layers.0.mlp.{name}"
        shapes[f"{module}.weight_packed"] = ("U8", (n, columns // 2))
        shapes[f"{module}.weight_scale"] = ("F8_E4M3", (n, columns // 16))
        shapes[f"{module}.weight_global_scale"] = ("F32", (1,))
    plan_of_file = plan_file([TensorSpec(name, dtype, shape) for name, (dtype, shape) in shapes.items()])
    with (folder / "model.safetensors").open("wb") as f:
        f.truncate(plan_of_file.size_bytes)
        f.write(plan_of_file.header)
        for begin, end in plan_of_file.offsets.values():
            f.seek(begin)
            f.write(b"\x00\x00\x80\x3f" if end - begin == 4 else b"\x21\x43\x38\x30" * ((end - begin) // 4))
    (folder / "config.json").write_text(json.dumps(config))
    model, work = make_model(folder), streams.work_of(folder)
    assert lent_bytes(work) > 12_000_000
    with pytest.raises(BudgetTooSmall) as refused:
        Limits(parallel=2, stream=True, max_ram_bytes=1).share_memory(work, remote=True, network=True)
    named = re.search(r"expected at least (\d+) MB", str(refused.value))
    assert named is not None
    cap = (int(named[1]) + 1) * 1_000_000
    out, peak = tmp_path / "out", 0
    words = ["quantize", model.repo, "-o", str(out), "-q", "--stream", "--parallel", "2", "--max-ram", f"{cap}B"]
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "shardq.cli", *words],
        env=model.environment(tmp_path, "COLUMNS", 80),
        cwd=tmp_path,
    )
    while process.poll() is None:
        peak = max(peak, measures.anonymous_bytes(process.pid))
        time.sleep(0.01)
    assert process.returncode == 0
    assert 2 * largest_span_bytes(work) < peak < cap
