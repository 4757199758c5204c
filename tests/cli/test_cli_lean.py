"""What a plain run loads, as each module costs CPU time at its start: only what it uses."""

import json
import os
import subprocess
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Final

import pytest

import shardq

# Groups of modules that plain weights of a folder, in a scheme of integers, have no use for.
RARE: Final = {
    "GGUF files": ("shardq.gguf", "shardq.files.gguf", "shardq.files.gguf_read", "shardq.block_rows"),
    "MLX": ("shardq.layouts.mlx", "shardq.layouts.mlx_families", "shardq.quantizers.mlx"),
    "other layouts": ("shardq.layouts.compressed_tensors", "shardq.layouts.gptq", "shardq.layouts.fp8"),
    "folds": ("shardq.fold", "shardq.fold_rows", "shardq.fold_sites", "shardq.fold_weights", "shardq.folding"),
    "importance": ("shardq.importance", "shardq.importance_files", "shardq.importance_vectors", "shardq.imatrix"),
    "searches": ("shardq.searching", "shardq.quantizers.search_rows", "shardq.quantizers.search_job"),
    "tuned folders": ("shardq.tuned", "shardq.tuned_rows", "shardq.replaced", "shardq.tune"),
    "mixtures": ("shardq.mixing", "shardq.mixture", "shardq.mixture_choice", "shardq.recipe_file", "shardq.tables"),
    "quantized sources": (
        "shardq.dequantize.base", "shardq.dequantize.kinds", "shardq.decoded", "shardq.carry", "shardq.carry_codes",
        "shardq.conversion",
    ),
    "stacks": ("shardq.stacks", "shardq.split_stacks"),
    "range mode": ("shardq.streamer", "shardq.lender", "shardq.loans", "shardq.ahead"),
    "engines and reports": ("shardq.serving", "shardq.html_report.charts", "shardq.html_report.page", "html"),
    "all that is finished": ("shardq.outputs", "shardq.verification", "shardq.auditing"),
    "torch": ("torch",),
}  # fmt: skip
HUB: Final = {
    "the Hub": ("shardq.sources.hub", "shardq.sources.hub_errors", "shardq.destinations.hub", "huggingface_hub"),
    "threads and processes": ("multiprocessing", "concurrent.futures", "asyncio", "socket", "shardq.executors.child"),
    "little for much": ("statistics", "fractions", "gzip", "secrets", "tempfile"),
}
USED: Final = {"shardq.gguf", "shardq.gguf.file_types"}  # names of file types are no schemes
LINES: Final = (
    "import atexit, json, sys",
    "from shardq.cli import main",
    "atexit.register(lambda: print(json.dumps(sorted(sys.modules))))",
    "main()",
)


def loaded(words: Sequence[str], env: dict[str, str] | None = None) -> list[str]:
    """The modules of a fresh process after a command."""
    done = subprocess.run(
        [sys.executable, "-P", "-c", "\n".join(LINES), *words], capture_output=True, text=True, check=True, env=env
    )
    found: list[str] = json.loads(done.stdout.splitlines()[-1])
    return found


def unwanted(modules: Collection[str], *groups: dict[str, tuple[str, ...]]) -> dict[str, list[str]]:
    """Of each group what is there, packages with all below them."""
    found = {}
    for group in groups:
        for name, heads in group.items():
            there = [m for m in modules for head in heads if m == head or m.startswith(f"{head}.")]
            if there := [m for m in there if m not in USED]:
                found[name] = there
    return found


@pytest.fixture(scope="module")
def plain_run(demo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What a plain run in one process loads."""
    out = tmp_path_factory.mktemp("lean") / "out"
    return loaded(["quantize", str(demo_folder), "-q", "--scheme", "W4A16", "--parallel", "1", "-o", str(out)])


def test_a_plain_run_loads_what_it_uses(plain_run: list[str]) -> None:
    assert unwanted(plain_run, RARE, HUB) == {}
    assert {"numpy", "shardq.worker", "shardq.layouts.auto_round"} <= set(plain_run)


def test_every_group_exists() -> None:
    """Or a module that is called otherwise would never be found."""
    package = Path(shardq.__file__).parent
    for heads in (*RARE.values(), *HUB.values()):
        for head in heads:
            path = package.joinpath(*head.split(".")[1:])
            assert not head.startswith("shardq") or path.is_dir() or path.with_suffix(".py").exists(), head


def test_workers_are_forked_with_all_that_they_need(demo_folder: Path, tmp_path: Path) -> None:
    words = ["quantize", str(demo_folder), "-q", "--scheme", "W4A16", "--parallel", "2", "-o", str(tmp_path / "out")]
    modules = loaded(words)
    assert unwanted(modules, RARE) == {}
    assert {"shardq.worker", "shardq.kernels", "multiprocessing"} <= set(modules)


def test_a_run_from_the_hub_loads_no_range_mode(hub: Any, tmp_path: Path) -> None:
    env = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf")}
    modules = loaded(
        ["quantize", "org/model", "-q", "--scheme", "W4A16", "--parallel", "1", "-o", str(tmp_path / "out")], env
    )
    assert unwanted(modules, {name: heads for name, heads in RARE.items() if name != "engines and reports"}) == {}
    assert "shardq.sources.hub" in modules
    assert "shardq.destinations.hub" not in modules
