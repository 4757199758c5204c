"""What we write as compressed-tensors, read by the library itself: as far from the source as our ledger says."""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest
import torch

import shardq
from shardq import Limits
from shardq.layouts import find_layout
from shardq.ledger import LEDGER, decode_ledger
from shardq.schemes import PRESETS

pytestmark = pytest.mark.oracle
CT = find_layout("compressed-tensors")
HELD = [  # those that need data: test_engine_static.py
    p.name for p in PRESETS.values() if CT.refuse(s := CT.settle(p.scheme), s, 256, 256) is None and not s.calibrated
]


@pytest.fixture(scope="module")
def peer(load_beside: Callable[[str], ModuleType]) -> ModuleType:
    if find_spec("compressed_tensors") is None:
        pytest.skip("compressed-tensors is not installed here; `nox -s oracles` installs it")
    return load_beside("peers_compressed_tensors")


@pytest.mark.parametrize("name", HELD)
def test_the_library_reads_what_the_ledger_says(
    peer: ModuleType, demo_weights: dict[str, torch.Tensor], tmp_path: Path, name: str
) -> None:
    out = tmp_path / "out"
    shardq.quantize("demo", f"{name}@compressed-tensors", output_dir=out, limits=Limits(parallel=1))
    entries = decode_ledger((out / LEDGER).read_bytes())["tensors"]
    quantized = {n: e for n, e in entries.items() if e["outcome"] == "quantized"}
    read = peer.read_folder(out)
    assert {f"{module}.weight" for module in read} == quantized.keys()
    for module, weight in read.items():
        entry, own = quantized[f"{module}.weight"], demo_weights[f"{module}.weight"].float()
        difference = own - weight.float()
        assert difference.abs().max().item() == entry["max_error"], module
        squares = difference.double().square().sum().item()
        assert squares == pytest.approx(entry["squared_error"], rel=1e-5), module
