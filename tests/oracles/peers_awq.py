"""An AWQ (GEMM) checkpoint as compressed-tensors' AutoAWQConverter reads it (0.20.0)."""

import json
from importlib import import_module
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import load_file

compressors: Any = import_module("compressed_tensors.compressors")
converters: Any = import_module("compressed_tensors.entrypoints.convert.converters.autoawq")
quantization: Any = import_module("compressed_tensors.quantization")

FORMAT: Final = "pack-quantized"


def read_folder(folder: Path) -> dict[str, torch.Tensor]:
    """Module -> float32 weight, for every module with a `qweight`.

    Raises ValueError where a module has one tensor too few, AssertionError where the config says not to convert one.
    """
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    tensors = {k: v for path in sorted(folder.glob("*.safetensors")) for k, v in load_file(path).items()}
    converter = converters.AutoAWQConverter.from_autoawq_config(config)
    converter.validate(tensors)
    modules = [n.removesuffix(".qweight") for n in tensors if n.endswith(".qweight")]
    tensors = converter.process(tensors)
    return {module: _decompress(tensors, module, config) for module in modules}


def _decompress(tensors: dict[str, torch.Tensor], module: str, config: dict[str, Any]) -> torch.Tensor:
    names = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point")
    assert f"{module}.weight_packed" in tensors, f"{module} is quantized, and the config says it is not"
    state = {n: tensors[f"{module}.{n}"] for n in names}
    state["weight_scale"] = state["weight_scale"].float()
    columns = int(state["weight_shape"][1])
    group = columns if config["group_size"] == -1 else config["group_size"]
    args = quantization.QuantizationArgs(num_bits=config["bits"], symmetric=False, strategy="group", group_size=group)
    scheme = quantization.QuantizationScheme(targets=["Linear"], weights=args)
    compressor = compressors.BaseCompressor.get_value_from_registry(FORMAT)
    weight: torch.Tensor = compressor.decompress(state, scheme)["weight"]
    return weight
