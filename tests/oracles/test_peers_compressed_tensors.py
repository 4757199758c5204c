"""What we write as compressed-tensors, read by the library itself: as far from the source as our ledger says."""

import importlib.util
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file

import shardq
from shardq import Limits
from shardq.layouts import find_layout
from shardq.ledger import LEDGER, decode_ledger
from shardq.schemes import PRESETS
from shardq.sources.demo import open_demo

pytestmark = pytest.mark.oracle
CT = find_layout("compressed-tensors")
HELD = [p.name for p in PRESETS.values() if CT.refuse(s := CT.settle(p.scheme), s, 256, 256) is None]


@pytest.fixture(scope="module")
def peer() -> ModuleType:
    if find_spec("compressed_tensors") is None:
        pytest.skip("compressed-tensors is not installed here; `nox -s oracles` installs it")
    path = Path(__file__).with_name("peers_compressed_tensors.py")
    spec = importlib.util.spec_from_file_location("peers_compressed_tensors", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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


@pytest.mark.parametrize("name", HELD)
def test_the_library_reads_what_the_ledger_says(
    peer: ModuleType, source: dict[str, torch.Tensor], tmp_path: Path, name: str
) -> None:
    out = tmp_path / "out"
    shardq.quantize("demo", f"{name}@compressed-tensors", output_dir=out, limits=Limits(parallel=1))
    entries = decode_ledger((out / LEDGER).read_bytes())["tensors"]
    quantized = {n: e for n, e in entries.items() if e["outcome"] == "quantized"}
    read = peer.read_folder(out)
    assert {f"{module}.weight" for module in read} == quantized.keys()
    for module, weight in read.items():
        entry, own = quantized[f"{module}.weight"], source[f"{module}.weight"].float()
        difference = own - weight.float()
        assert difference.abs().max().item() == entry["max_error"], module
        squares = difference.double().square().sum().item()
        assert squares == pytest.approx(entry["squared_error"], rel=1e-5), module
