"""Memory of the whole process tree, sampled from outside, on a checkpoint far larger than it."""

import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

import shardq
from shardq.files.safetensors import TensorSpec, plan_file
from shardq.limits import BASE_BYTES, TENSOR_BYTES, WORKER_BYTES
from shardq.onepass import OnePass
from shardq.tasks import SLAB_BYTES

WORKERS = 2
ROW = b"\x12\x3c\x9a\xbb\x05\x3d\x77\xbc" * 1024  # 4096 BF16 weights of about 0.01
SAMPLE_S = 0.01
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@pytest.fixture(scope="session")
def giant(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One shard of 300 MB with a tensor of 150 MB, one of 75 MB and nine of 8 MB."""
    folder = tmp_path_factory.mktemp("source") / "giant"
    folder.mkdir()
    rows = [18_432, 9_216, *[1_024] * 9]
    specs = [TensorSpec(f"model.layers.{i}.mlp.up_proj.weight", "BF16", (n, 4096)) for i, n in enumerate(rows)]
    plan = plan_file(specs)
    with (folder / "model.safetensors").open("wb") as f:
        f.write(plan.header)
        for _ in range(sum(rows) // 1024):
            f.write(ROW * 1024)
    (folder / "config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
    return folder


def test_peak_stays_below_the_cap_and_far_below_the_shard(giant: Path, tmp_path: Path, measures: ModuleType) -> None:
    plan = shardq.plan(giant)
    assert plan.source_bytes > 300_000_000
    assert max(t.source_bytes for t in plan.tasks) == SLAB_BYTES
    records = len(plan.decisions) * TENSOR_BYTES
    cap = BASE_BYTES + records + WORKERS * (WORKER_BYTES + OnePass((plan,)).largest_task_bytes)
    command = [sys.executable, "-P", "-m", "shardq.cli", "quantize", str(giant), "-q", "-o", str(tmp_path / "out")]
    process = subprocess.Popen([*command, "--parallel", str(WORKERS), "--max-ram", f"{cap}B"])
    peak = 0
    while process.poll() is None:
        peak = max(peak, measures.anonymous_bytes(process.pid))
        time.sleep(SAMPLE_S)
    assert process.returncode == 0
    assert 20_000_000 < peak < cap
    assert peak < 250_000_000


def test_smallest_cap_runs_one_task_at_a_time(giant: Path, tmp_path: Path) -> None:
    plan = shardq.plan(giant)
    least = (
        BASE_BYTES + len(plan.decisions) * TENSOR_BYTES + WORKERS * WORKER_BYTES + OnePass((plan,)).largest_task_bytes
    )
    limits = shardq.Limits(parallel=WORKERS, max_ram_bytes=least)
    shardq.quantize(giant, output_dir=tmp_path / "out", limits=limits)
    shardq.quantize(giant, output_dir=tmp_path / "other", limits=shardq.Limits(parallel=1))
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (
        tmp_path / "other" / "model.safetensors"
    ).read_bytes()
