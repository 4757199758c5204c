"""GGUF files beside others from one read: each output has the bytes of a run alone, however the run is stopped. And
what memory and disk that takes."""

import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from stopped_runs import stop_after

import shardq
from shardq import Limits, Progress
from shardq.errors import BudgetTooSmall, DiskFull
from shardq.files.safetensors import TensorSpec, plan_file
from shardq.onepass import OnePass
from shardq.opening import make_orders
from shardq.tasks import SLAB_BYTES

pytest.importorskip("gguf", reason="names of GGUF tensors come from the package gguf")
pytest.importorskip("tokenizers", reason="vocabularies are read with the package tokenizers")
import gguf_sources as made

ONE, EATING = Limits(parallel=1), Limits(parallel=1, delete_source=True)
STREAMS = pytest.mark.skipif(sys.platform != "linux", reason="memory without a name is there on Linux only")
Contents = Callable[[Path], dict[str, str]]


def recipes(name: str) -> list[shardq.Recipe]:
    """One GGUF file, shards of safetensors, and several GGUF files of another type."""
    other = shardq.make_recipe("W4A16", group_size=32)
    return [made.recipe(name), other, made.recipe(name, 100_000, "q8_0")]


def names(wanted: list[shardq.Recipe]) -> list[str]:
    return [order.out.name for order in make_orders(wanted, "x", "x")]


@pytest.mark.parametrize("name", ["rotary", "experts", "fp8", "mxfp4"])
@pytest.mark.parametrize("limits", [ONE, EATING, Limits(parallel=2)], ids=["kept", "eaten", "workers"])
def test_each_output_is_that_of_a_run_alone_however_often_the_run_is_stopped(
    tmp_path: Path, contents: Contents, name: str, limits: Limits
) -> None:
    source, outs, wanted = made.write(name, tmp_path), tmp_path / "outs", recipes(name)
    for recipe, folder in zip(wanted, names(wanted), strict=True):
        shardq.quantize(source, recipe, output_dir=tmp_path / "alone" / folder, limits=ONE)
    for tasks in (6, 14) if limits.parallel == 1 else ():
        with pytest.raises(KeyboardInterrupt):
            shardq.quantize_many(source, wanted, output_dir=outs, limits=limits, report=stop_after(tasks))
    steps: list[Progress] = []
    shardq.quantize_many(source, wanted, output_dir=outs, limits=limits, report=steps.append)
    assert steps[-1].resumed_bytes > 0 or limits.parallel > 1
    assert contents(outs) == contents(tmp_path / "alone")
    assert bool(list(source.glob(made.SHARDS))) == (limits is not EATING)
    if limits is not EATING:
        assert all(r.already_done for r in shardq.quantize_many(source, wanted, output_dir=outs, limits=limits))


def test_one_that_is_finished_and_one_that_is_half_done_join_the_others(tmp_path: Path, contents: Contents) -> None:
    source, outs, wanted = made.write("experts", tmp_path), tmp_path / "outs", recipes("experts")
    first, second, third = names(wanted)
    for recipe, folder in zip(wanted, names(wanted), strict=True):
        shardq.quantize(source, recipe, output_dir=tmp_path / "alone" / folder, limits=ONE)
    shardq.quantize(source, wanted[0], output_dir=outs / first, limits=ONE)
    with pytest.raises(KeyboardInterrupt):
        shardq.quantize(source, wanted[2], output_dir=outs / third, limits=ONE, report=stop_after(30))
    with pytest.raises(KeyboardInterrupt):
        shardq.quantize_many(source, wanted, output_dir=outs, limits=ONE, report=stop_after(10))
    assert not (outs / second / "config.json").exists()
    results = shardq.quantize_many(source, wanted, output_dir=outs, limits=ONE)
    assert [r.already_done for r in results] == [True, False, False]
    assert contents(outs) == contents(tmp_path / "alone")


# --- disk ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part_bytes", [None, 4_000_000], ids=["one file", "parts"])
def test_eating_needs_no_more_room_than_the_output_that_is_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part_bytes: int | None
) -> None:
    source, recipe = made.write("large", tmp_path), made.recipe("large", part_bytes)
    size = shardq.plan(source, recipe).output_bytes
    real = shutil.disk_usage(tmp_path)

    def run(free: int) -> None:
        with monkeypatch.context() as inner:
            inner.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(total=real.total, free=free))
            shardq.quantize(source, recipe, output_dir=tmp_path / "out", limits=EATING)

    with pytest.raises(DiskFull, match="free some space"):
        run(size // 3)
    run(size)
    assert not list(source.glob(made.SHARDS))


# --- memory ----------------------------------------------------------------------------------------------------------

ROW = b"\x12\x3c\x9a\xbb\x05\x3d\x77\xbc" * 512  # 2048 BF16 weights of about 0.01


@pytest.fixture(scope="module")
def giant(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One shard with a stack of 200 MB of experts, another one of 100 MB, and some that is small."""
    case = made.made.MODELS["qwen3moe_stacked"]
    folder = tmp_path_factory.mktemp("giant") / "Giant"
    folder.mkdir()
    inner, hidden, experts = 1536, 2048, 16
    sizes = {"hidden_size": hidden, "moe_intermediate_size": inner, "num_experts": experts, "num_hidden_layers": 1}
    for name, data in made.checkpoints.side_files(case).items():
        (folder / name).write_bytes(data)
    (folder / "config.json").write_text(made.json.dumps({**case.config, **sizes}))
    wide = {64: hidden, 4: experts}
    shapes = {n: tuple(wide.get(x, x) for x in s) for n, s in case.shapes.items() if "layers.1." not in n}
    shapes |= {
        "model.layers.0.mlp.experts.gate_up_proj": (experts, 2 * inner, hidden),
        "model.layers.0.mlp.experts.down_proj": (experts, hidden, inner),
    }
    shapes |= {n: (32,) for n in shapes if n.endswith(("q_norm.weight", "k_norm.weight"))}
    rows = {"q": 128, "k": 64, "v": 64}
    shapes |= {f"model.layers.0.self_attn.{p}_proj.weight": (n, hidden) for p, n in rows.items()}
    shapes |= {"model.layers.0.self_attn.o_proj.weight": (hidden, 128)}
    specs = [TensorSpec(n, "BF16", s) for n, s in shapes.items()]
    plan = plan_file(specs)
    with (folder / "model.safetensors").open("wb") as f:
        f.write(plan.header)
        left = plan.size_bytes - len(plan.header)
        while left:
            left -= f.write((ROW * 256)[: min(left, 256 * len(ROW))])
    return folder


@pytest.mark.parametrize("streamed", [False, pytest.param(True, marks=STREAMS)], ids=["folder", "stream"])
def test_peak_stays_below_the_cap_and_far_below_a_stack(
    giant: Path, tmp_path: Path, measures: ModuleType, make_model: Callable[[Path], Any], streamed: bool
) -> None:
    recipe = shardq.make_recipe("gguf:q4_k_m", gguf=made.GgufOptions(tokenizer_pre="qwen2"))
    plan = shardq.plan(giant, recipe)
    assert plan.source_bytes > 300_000_000
    assert max(t.source_bytes for t in plan.tasks) <= SLAB_BYTES
    with pytest.raises(BudgetTooSmall) as refused:
        Limits(parallel=2, stream=streamed, max_ram_bytes=1).share_memory(
            OnePass((plan,)), remote=streamed, network=streamed
        )
    least = int(str(refused.value).partition("expected at least ")[2].split(" ", 1)[0])
    model = make_model(giant) if streamed else None
    words = [model.repo, "--stream"] if model else [str(giant)]
    command = [sys.executable, "-P", "-m", "shardq.cli", "quantize", *words, "-q", "--parallel", "2"]
    command += ["--scheme", "gguf:q4_k_m", "--tokenizer-pre", "qwen2", "-o", str(tmp_path / "out")]
    environment = model.environment(tmp_path, "COLUMNS", 80) if model else None
    peak, process = 0, subprocess.Popen([*command, "--max-ram", f"{least + 1}M"], env=environment)
    while process.poll() is None:
        peak = max(peak, measures.anonymous_bytes(process.pid))
        time.sleep(0.01)
    assert process.returncode == 0
    assert OnePass((plan,)).largest_task_bytes < peak < (least + 1) * 1_000_000
    assert peak < 250_000_000
