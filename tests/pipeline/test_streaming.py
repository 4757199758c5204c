"""Range mode: source shards pass through memory, piece by piece, and never touch the disk."""

import gc
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import psutil
import pytest

import shardq
from shardq import Limits, Progress, make_recipe
from shardq.errors import BadOption, BudgetTooSmall
from shardq.files.safetensors import TensorSpec, plan_file
from shardq.formats import STORAGE
from shardq.limits import SPANS_AHEAD
from shardq.onepass import OnePass
from shardq.run import quantize_to_folder
from shardq.spans import cut_all, largest_span_bytes
from shardq.traffic import count_requests

OF_THE_SOURCE = {"README.md", "shardq.json", "shardq-ledger.json.zst"}  # they name the source and its commit
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 128, "intermediate_size": 384,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 64,
}  # fmt: skip
SAMPLE_S = 0.01
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory without a name is there on Linux only")

Contents = Callable[[Path], dict[str, str]]
Tensors = Sequence[tuple[str, str, tuple[int, ...]]]


def write_shard(path: Path, tensors: Tensors, rng: np.random.Generator) -> None:
    """Random weights; integers are zeros."""
    specs = [TensorSpec(*t) for t in tensors]
    plan = plan_file(specs)
    data = bytearray(plan.size_bytes)
    data[: len(plan.header)] = plan.header
    for spec in specs:
        single = rng.standard_normal(spec.shape, np.float32) * np.float32(0.02)
        values = {
            "F32": single.tobytes(),
            "F16": single.astype(np.float16).tobytes(),
            "BF16": (single.view(np.uint32) >> 16).astype(np.uint16).tobytes(),
        }.get(spec.dtype, bytes(single.size * STORAGE[spec.dtype].bits // 8))
        begin, end = plan.offsets[spec.name]
        data[begin:end] = values
    path.write_bytes(data)


def motley(folder: Path, tied: bool) -> Path:
    """Three shards: many dtypes and sizes, a giant and an empty tensor; one shard has nothing but an empty tensor."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(7)
    layer = "model.layers.0"
    first: list[tuple[str, str, tuple[int, ...]]] = [
        ("model.embed_tokens.weight", "F32", (64, 128)),
        (f"{layer}.mlp.up_proj.weight", "BF16", (4096, 128)),  # the giant
        (f"{layer}.mlp.gate_proj.weight", "F16", (4096, 128)),
        (f"{layer}.input_layernorm.weight", "BF16", (128,)),
        (f"{layer}.self_attn.rotary_emb.inv_freq", "F32", (16,)),
        ("model.empty", "F32", (0, 4)),
        ("step", "I64", ()),
        *((f"{layer}.self_attn.{p}_proj.weight", "F32", (32 * n, 128)) for n, p in enumerate("qkvo", start=1)),
        *((f"{layer}.self_attn.{p}_proj.bias", "BF16", (32 * n,)) for n, p in enumerate("qkvo", start=1)),
    ]
    second: list[tuple[str, str, tuple[int, ...]]] = [
        ("model.layers.1.mlp.down_proj.weight", "BF16", (128, 384)),
        *((f"model.layers.1.norms.{n}.norm.weight", "F32", (n + 1,)) for n in range(100)),
        ("model.norm.weight", "F16", (128,)),
    ]
    if not tied:
        second.append(("lm_head.weight", "BF16", (64, 128)))
    shards: dict[str, Tensors] = {
        "a.safetensors": first,
        "b.safetensors": second,
        "c.safetensors": [("model.void", "BF16", (0,))],
    }
    for name, tensors in shards.items():
        write_shard(folder / name, tensors, rng)
    weight_map = {t[0]: name for name, tensors in shards.items() for t in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps({**CONFIG, "tie_word_embeddings": tied}))
    return folder


@contextmanager
def watching(folder: Path) -> Iterator[set[str]]:
    """The names of all files that were ever seen in a folder."""
    seen: set[str] = set()
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.0005):
            for _, _, names in os.walk(folder):
                seen.update(names)

    thread = threading.Thread(target=watch)
    thread.start()
    yield seen
    over.set()
    thread.join()


@pytest.fixture(autouse=True)
def _no_pieces_of_earlier_tests() -> None:
    """The traceback of an error may hold views of a piece, in a cycle, until the collector comes."""
    gc.collect()


def pieces_held() -> int:
    """Pieces of memory that this process has now, each under several descriptors."""
    held: set[int] = set()
    for link in Path("/proc/self/fd").iterdir():
        try:
            if "shardq-span" in os.readlink(link):
                held.add(os.stat(link).st_ino)
        except FileNotFoundError:
            continue
    return len(held)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("parallel", [1, 2])
def test_stream_writes_what_a_local_run_writes(
    make_model: Callable[[Path], Any], tmp_path: Path, contents: Contents, one: Limits, short_spans: int, parallel: int,
    tied: bool,
) -> None:  # fmt: skip
    folder = motley(tmp_path / "model", tied)
    model, out = make_model(folder), tmp_path / "out"
    shardq.quantize(folder, output_dir=tmp_path / "local", limits=one)
    with watching(out / ".shardq" / "src") as staged:
        model.run(model.open(), out, "stream", parallel=parallel)
    here, there = contents(tmp_path / "local"), contents(out)
    assert here.keys() == there.keys()
    assert {n for n in here if here[n] != there[n]} == OF_THE_SOURCE
    assert shardq.verify(out, deep=True, source=folder).problems == ()
    assert staged == set()
    assert pieces_held() == 0


def test_every_byte_comes_once_in_spans_and_an_address_once_a_shard(
    make_model: Callable[[Path], Any], tmp_path: Path, short_spans: int
) -> None:
    folder = motley(tmp_path / "model", tied=False)
    model = make_model(folder)
    source = model.open()
    model.forget()
    model.run(source, tmp_path / "out", "stream")
    plan = shardq.plan(folder)
    requests = bodies = 0
    for shard in plan.checkpoint.shards:
        spans = cut_all(OnePass((plan,)))[shard.name]
        asked = [(s.begin, s.begin + s.sent_bytes) for s in model.asked(shard.name)]
        assert asked == [(s.begin, s.end) for s in spans]
        resolved = [s for s in model.hub.log if s.path.endswith(f"/resolve/{source.commit}/{shard.name}")]
        assert len(resolved) == 2  # one for the header, one for all spans
        requests += len(resolved) + 1 + len(asked)
        bodies += len(asked)
    assert bodies > 20
    promised = count_requests(OnePass((plan,)), stream=True)
    assert promised.storage == len(plan.files) + bodies
    assert promised.hub >= requests - promised.storage


def test_pieces_of_memory_are_few_and_go_round(
    make_model: Callable[[Path], Any], tmp_path: Path, short_spans: int
) -> None:
    model = make_model(motley(tmp_path / "model", tied=False))
    most = {1: 0, 2: 0}
    for parallel in most:

        def count(_: Progress, parallel: int = parallel) -> None:
            most[parallel] = max(most[parallel], pieces_held())

        model.run(model.open(), tmp_path / f"out{parallel}", "stream", count, parallel)
    assert most == {parallel: parallel + SPANS_AHEAD for parallel in most}


def test_smallest_cap_on_memory_runs_with_two_pieces(
    make_model: Callable[[Path], Any], tmp_path: Path, contents: Contents, short_spans: int
) -> None:
    folder = motley(tmp_path / "model", tied=False)
    model = make_model(folder)
    model.run(model.open(), tmp_path / "free", "stream")
    plan = shardq.plan(folder)
    floor = Limits(parallel=2, stream=True, max_ram_bytes=1)
    with pytest.raises(BudgetTooSmall, match=r"two pieces of .* MB; expected at least (\d+) MB") as refused:
        floor.share_memory(OnePass((plan,)), remote=True, network=True)
    named = re.search(r"expected at least (\d+) MB", str(refused.value))
    assert named is not None
    caps = [int(named[1]) * 1_000_000 + n for n in (-1_000_000, 1_000_000)]  # the message is rounded
    held = 0

    def count(_: Progress) -> None:
        nonlocal held
        held = max(held, pieces_held())

    def run(cap: int) -> None:
        limits = Limits(parallel=2, stream=True, max_ram_bytes=cap)
        quantize_to_folder(model.open(), make_recipe("W4A16"), tmp_path / "out", limits, False, count)

    with pytest.raises(BudgetTooSmall):
        run(caps[0])
    run(caps[1])
    assert 2 <= held <= 2 + SPANS_AHEAD
    assert contents(tmp_path / "out") == contents(tmp_path / "free")


def test_killed_worker_reads_its_piece_again(
    make_model: Callable[[Path], Any], tmp_path: Path, contents: Contents, short_spans: int
) -> None:
    model = make_model(motley(tmp_path / "model", tied=False))
    model.run(model.open(), tmp_path / "usual", "stream")
    killed: list[int] = []
    me = psutil.Process()
    before = me.children(recursive=True)

    def kill(step: Progress) -> None:
        if step.stage != "work" or killed:
            return
        for process in me.children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                if process not in before and process.ppid() != me.pid:  # not the fork server
                    process.kill()
                    killed.append(process.pid)
                    return

    model.run(model.open(), tmp_path / "out", "stream", kill, 2)
    assert killed
    assert contents(tmp_path / "out") == contents(tmp_path / "usual")


def test_a_system_without_such_memory_is_told(
    make_model: Callable[[Path], Any], checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(checkpoint)
    monkeypatch.delattr(os, "memfd_create")
    with pytest.raises(BadOption, match=r"memfd_create.*stage shards on disk"):
        model.run(model.open(), tmp_path / "out", "stream")


# --- measured -------------------------------------------------------------------------------------------------------


def test_memory_of_the_whole_tree_stays_below_the_cap(
    make_model: Callable[[Path], Any], tmp_path: Path, measures: ModuleType
) -> None:
    folder = tmp_path / "giant"
    folder.mkdir()
    specs = [
        TensorSpec(f"model.layers.{i}.mlp.up_proj.weight", "BF16", (n, 4096)) for i, n in enumerate([24_576, 4_096])
    ]
    plan_of_file = plan_file(specs)
    with (folder / "model.safetensors").open("wb") as f:
        f.write(plan_of_file.header)
        for _ in range(28):
            f.write(b"\x12\x3c\x9a\xbb\x05\x3d\x77\xbc" * (1 << 20))
    (folder / "config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
    model, plan = make_model(folder), shardq.plan(folder)
    assert plan.source_bytes > 230_000_000
    with pytest.raises(BudgetTooSmall) as refused:
        Limits(parallel=2, stream=True, max_ram_bytes=1).share_memory(OnePass((plan,)), remote=True, network=True)
    named = re.search(r"expected at least (\d+) MB", str(refused.value))
    assert named is not None
    cap = (int(named[1]) + 1) * 1_000_000
    out = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "shardq.cli", "quantize", model.repo, "-o", str(out), "-q", "--stream",
         "--parallel", "2", "--max-ram", f"{cap}B"],
        env=model.environment(tmp_path, "COLUMNS", 80),
        cwd=tmp_path,
    )  # fmt: skip
    peak = 0
    with watching(out / ".shardq" / "src") as staged:
        while process.poll() is None:
            peak = max(peak, measures.anonymous_bytes(process.pid))
            time.sleep(SAMPLE_S)
    assert process.returncode == 0
    assert staged == set()
    assert 2 * largest_span_bytes(OnePass((plan,))) < peak < cap
