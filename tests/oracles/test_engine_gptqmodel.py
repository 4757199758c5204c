"""What we write as gptq and awq, packed again by GPTQModel and loaded by it (7.7.0), dense and with experts, and by
transformers with it (5.23.0)."""

import json
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import pytest
import torch
from safetensors.torch import load_file

from shardq import Limits, make_recipe, quantize

pytestmark = [pytest.mark.oracle, pytest.mark.slow]

MakePair = Callable[..., Any]
RunEngine = Callable[[str, Sequence[Path]], dict[Path, dict[str, Any]]]
FP16, BF16 = 0.001, 0.01  # 0.0008 and 0.0086 were measured: dequantized in that type, and summed in another order
SCHEMES: Final = (
    "W2A16@gptq",
    "W3A16@gptq",
    "W4A16@gptq",
    "W8A16@gptq",
    "W2A16-ASYM@gptq",
    "W3A16-ASYM@gptq",
    "W4A16-ASYM@gptq",
    "W8A16-ASYM@gptq",
    "W4A16@awq",
    "W4A16-ASYM@awq",
)
CASES: Final = [(kind, scheme) for kind in ("qwen3", "qwen3_moe") for scheme in SCHEMES]
TRANSFORMERS: Final = ("W4A16@gptq", "W8A16@gptq", "W4A16-ASYM@gptq", "W4A16@awq", "W4A16-ASYM@awq")


@pytest.fixture(scope="module", autouse=True)
def gptqmodel() -> None:
    if find_spec("gptqmodel") is None:
        pytest.skip("GPTQModel is not installed here; `nox -s engine_gptqmodel` installs it")


@pytest.fixture(scope="module")
def by_gptqmodel(gptqmodel: None, make_pair: MakePair, run_engine: RunEngine) -> dict[Path, dict[str, Any]]:
    return run_engine("gptqmodel", [make_pair(*case, torch.float16).quantized for case in CASES])


@pytest.fixture(scope="module")
def by_transformers(gptqmodel: None, make_pair: MakePair, run_engine: RunEngine) -> dict[Path, dict[str, Any]]:
    cases = [(kind, scheme) for kind in ("qwen3", "qwen3_moe") for scheme in TRANSFORMERS]
    return run_engine("transformers", [make_pair(*case).quantized for case in cases])


@pytest.mark.parametrize(("kind", "scheme"), CASES)
def test_gptqmodel_loads(kind: str, scheme: str, models: Any, make_pair: MakePair, by_gptqmodel: Any) -> None:
    pair = make_pair(kind, scheme, torch.float16)
    theirs = by_gptqmodel[pair.quantized]
    assert "logits" in theirs, theirs
    ours = models.transformers_logits(pair.twin, torch.float16)
    assert models.relative_error(theirs["logits"], ours) <= FP16


@pytest.mark.parametrize("scheme", TRANSFORMERS)
def test_transformers_loads_dense_models(scheme: str, models: Any, make_pair: MakePair, by_transformers: Any) -> None:
    pair = make_pair("qwen3", scheme)
    assert models.judged(pair.quantized, "transformers") in {"loads", "limits"}
    theirs = by_transformers[pair.quantized]
    assert theirs.get("missing") == [], theirs
    ours = models.transformers_logits(pair.twin, torch.bfloat16)
    assert models.relative_error(theirs["logits"], ours) <= BF16


@pytest.mark.parametrize("scheme", TRANSFORMERS)
def test_transformers_loses_experts(scheme: str, models: Any, make_pair: MakePair, by_transformers: Any) -> None:
    """It stacks them under other names, and says only in a report that it made up their weights."""
    pair = make_pair("qwen3_moe", scheme)
    assert models.judged(pair.quantized, "transformers") == "no"
    missing = by_transformers[pair.quantized]["missing"]
    stacks = ("gate_up_proj", "down_proj")
    assert missing == sorted(f"model.layers.{i}.mlp.experts.{s}" for i in range(models.LAYERS) for s in stacks)


@pytest.mark.parametrize("group_size", [128, 32, -1])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptqmodel_packs_the_same_bytes(
    bits: int, symmetric: bool, group_size: int, models: Any, make_pair: MakePair, tmp_path: Path
) -> None:
    source = make_pair("qwen3", "W4A16@gptq").source
    recipe = make_recipe("W4A16@gptq", bits=bits, symmetric=symmetric, group_size=group_size)
    out = quantize(source, recipe, output_dir=tmp_path / "out", limits=Limits(parallel=1)).output
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    tensors = {name: t for path in out.glob("*.safetensors") for name, t in load_file(path).items()}
    modules = list(models.quantized_modules(out))
    assert len(modules) == models.LINEARS["qwen3"]
    for module, weight, zeros in modules:
        ours = {name: tensors[f"{module}.{name}"] for name in ("qweight", "qzeros", "scales", "g_idx")}
        theirs = pack(weight, ours["scales"].T.float(), zeros, ours["g_idx"], config)
        for name, tensor in ours.items():
            assert tensor.dtype == theirs[name].dtype, (module, name)
            assert torch.equal(tensor, theirs[name]), (module, name)


def pack(
    weight: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, g_idx: torch.Tensor, config: dict[str, Any]
) -> dict[str, torch.Tensor]:
    """GPTQModel's tensors for a [rows, columns] weight and its [rows, G] scales and zero points."""
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module

    rows, columns = weight.shape
    linear = torch.nn.Linear(columns, rows, bias=False)
    linear.weight.data = weight
    packed = TorchLinear(
        bits=config["bits"],
        group_size=config["group_size"],
        sym=config["sym"],
        desc_act=False,
        in_features=columns,
        out_features=rows,
        bias=False,
        pack_dtype=torch.int32,
        register_buffers=True,
    )
    assert torch.equal(packed.g_idx, g_idx)
    packed.pack_original(linear, scales, zeros, packed.g_idx)
    if config["checkpoint_format"] == "gptq":
        convert_gptq_v2_to_v1_format_module(packed, SimpleNamespace(bits=config["bits"], pack_dtype=torch.int32))
    return {name: getattr(packed, name) for name in ("qweight", "qzeros", "scales", "g_idx")}
