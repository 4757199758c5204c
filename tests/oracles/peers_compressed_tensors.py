"""A compressed-tensors checkpoint as compressed-tensors' own code reads it (0.20.0)."""

import json
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import load_file

compressors: Any = import_module("compressed_tensors.compressors")
fp4: Any = import_module("compressed_tensors.compressors.nvfp4.helpers")
quantization: Any = import_module("compressed_tensors.quantization")
forward: Any = import_module("compressed_tensors.quantization.lifecycle.forward")
match: Any = import_module("compressed_tensors.utils.match")

FP4_WITH_GLOBAL_SCALE: Final = "nvfp4-pack-quantized"
Tensors = dict[str, torch.Tensor]


def read_folder(folder: Path) -> Tensors:
    """Module -> float32 weight, for every module that the folder's own config says is quantized.

    Raises AssertionError where config and tensors do not fit: a parameter too few, or one that no module takes.
    """
    fields = json.loads((folder / "config.json").read_text())["quantization_config"]
    config = quantization.QuantizationConfig.model_validate(fields)
    assert config.quant_method == "compressed-tensors"
    tensors = {k: v for path in sorted(folder.glob("*.safetensors")) for k, v in load_file(path).items()}
    weights: Tensors = {}
    for scheme in config.config_groups.values():
        fmt = scheme.format or config.format
        for module, state in _take_modules(tensors, config, scheme, fmt):
            assert module not in weights, f"two groups take {module}"
            weights[module] = _decompress(state, scheme, fmt)
    parameters = {*quantization.QuantizationMetadata.all_qparam_names(), "weight_packed"}
    left = [n for n in tensors if n.rpartition(".")[2] in parameters]
    assert not left, f"no module takes {left}"
    return weights


def _take_modules(tensors: Tensors, config: Any, scheme: Any, fmt: str) -> Iterator[tuple[str, Tensors]]:
    """Modules of one group with their parameters, which are removed from `tensors`."""
    names = compressors.BaseCompressor.get_value_from_registry(fmt).compression_param_names(scheme)
    for module, _ in match.match_quantizable_tensors(tensors, config.ignore, scheme.targets, [names[0]]):
        missing = [n for n in names if f"{module}.{n}" not in tensors]
        if names[0] == "weight" and missing == list(names[1:]):  # the library would look at the module's class
            assert "embed" in module or tensors[f"{module}.weight"].ndim != 2, f"{module} is not quantized nor ignored"
            continue
        assert not missing, f"{module} has no {missing}"
        yield module, {n: tensors.pop(f"{module}.{n}") for n in names}


def _decompress(state: Tensors, scheme: Any, fmt: str) -> torch.Tensor:
    """The weight in float32; powers of two times a code of 8 bits or fewer are exact in any dtype."""
    if fmt == FP4_WITH_GLOBAL_SCALE:  # the class itself would round to bfloat16
        rows, half = state["weight_packed"].shape
        codes = fp4.unpack_fp4_from_uint8(state["weight_packed"], rows, 2 * half, torch.float32)
        scale, of_all = state["weight_scale"].float(), state["weight_global_scale"]
        weight: torch.Tensor = forward.dequantize(
            codes, scale, args=scheme.weights, dtype=torch.float32, global_scale=of_all
        )
        return weight
    if state["weight_scale"].dtype in (torch.bfloat16, torch.float16):
        state["weight_scale"] = state["weight_scale"].float()
    weight = compressors.BaseCompressor.get_value_from_registry(fmt).decompress(state, scheme)["weight"]
    return weight.float()
