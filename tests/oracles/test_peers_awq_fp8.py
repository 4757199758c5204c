"""What we write as awq and fp8, read by the peers' own code: as far from the source as our ledger says."""

import importlib.util
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file

import shardq
from shardq import Limits
from shardq.ledger import LEDGER, decode_ledger
from shardq.sources.demo import open_demo

pytestmark = pytest.mark.oracle
CASES = [
    ("W4A16@awq", "awq"), ("W4A16_ASYM@awq", "awq"), ("W4A16G32@awq", "awq"), ("FP8_BLOCK@fp8", "fp8"),
    ("MXFP8@fp8", "fp8"),
]  # fmt: skip


@pytest.fixture(scope="module")
def peer() -> Callable[[str], ModuleType]:
    """A function that loads tests/oracles/peers_<name>.py."""
    for package in ("compressed_tensors", "transformers"):
        if find_spec(package) is None:
            pytest.skip(f"{package} is not installed here; `nox -s oracles` installs it")

    def load(name: str) -> ModuleType:
        path = Path(__file__).with_name(f"peers_{name}.py")
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """The demo model's weights."""
    folder, demo = tmp_path_factory.mktemp("demo"), open_demo()
    weights: dict[str, torch.Tensor] = {}
    for file in demo.files():
        if file.name.endswith(".safetensors"):
            demo.fetch(file.name, folder / file.name, lambda _: None)
            weights |= load_file(folder / file.name)
    return weights


@pytest.mark.parametrize(("scheme", "reader"), CASES)
def test_peers_read_what_the_ledger_says(
    peer: Callable[[str], ModuleType], source: dict[str, torch.Tensor], tmp_path: Path, scheme: str, reader: str
) -> None:
    out = tmp_path / "out"
    shardq.quantize("demo", scheme, output_dir=out, limits=Limits(parallel=1))
    entries = decode_ledger((out / LEDGER).read_bytes())["tensors"]
    quantized = {n: e for n, e in entries.items() if e["outcome"] == "quantized"}
    read = peer(reader).read_folder(out)
    assert {f"{module}.weight" for module in read} == quantized.keys()
    for module, weight in read.items():
        entry = quantized[f"{module}.weight"]
        difference = source[f"{module}.weight"].float() - weight
        assert difference.abs().max().item() == entry["max_error"], module
        assert difference.double().square().sum().item() == pytest.approx(entry["squared_error"], rel=1e-5), module
