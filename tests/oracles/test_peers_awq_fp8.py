"""What we write as awq and fp8, read by the peers' own code: as far from the source as our ledger says."""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest
import torch

import shardq
from shardq import Limits
from shardq.ledger import LEDGER, decode_ledger

pytestmark = pytest.mark.oracle
CASES = [
    ("W4A16@awq", "awq"), ("W4A16_ASYM@awq", "awq"), ("W4A16G32@awq", "awq"), ("FP8_BLOCK@fp8", "fp8"),
    ("MXFP8@fp8", "fp8"),
]  # fmt: skip


@pytest.fixture(scope="module")
def peer(load_beside: Callable[[str], ModuleType]) -> Callable[[str], ModuleType]:
    """A function that loads tests/oracles/peers_<name>.py."""
    for package in ("compressed_tensors", "transformers"):
        if find_spec(package) is None:
            pytest.skip(f"{package} is not installed here; `nox -s oracles` installs it")

    return lambda name: load_beside(f"peers_{name}")


@pytest.mark.parametrize(("scheme", "reader"), CASES)
def test_peers_read_what_the_ledger_says(
    peer: Callable[[str], ModuleType], demo_weights: dict[str, torch.Tensor], tmp_path: Path, scheme: str, reader: str
) -> None:
    out = tmp_path / "out"
    shardq.quantize("demo", scheme, output_dir=out, limits=Limits(parallel=1))
    entries = decode_ledger((out / LEDGER).read_bytes())["tensors"]
    quantized = {n: e for n, e in entries.items() if e["outcome"] == "quantized"}
    read = peer(reader).read_folder(out)
    assert {f"{module}.weight" for module in read} == quantized.keys()
    for module, weight in read.items():
        entry = quantized[f"{module}.weight"]
        difference = demo_weights[f"{module}.weight"].float() - weight
        assert difference.abs().max().item() == entry["max_error"], module
        assert difference.double().square().sum().item() == pytest.approx(entry["squared_error"], rel=1e-5), module
