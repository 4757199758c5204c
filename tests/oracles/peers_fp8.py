"""A checkpoint of quant_method fp8 as transformers reads it (5.23.0), and blocks that it misreads as compressed-tensors
does (0.20.0)."""

import json
from importlib import import_module
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import load_file

blocks: Any = import_module("compressed_tensors.entrypoints.convert.converters.fp8block_dequantizer")
transformers: Any = import_module("transformers")
fp8: Any = import_module("transformers.integrations.finegrained_fp8")
quantizers: Any = import_module("transformers.quantizers.quantizers_utils")

SCALE: Final = ".weight_scale_inv"


def read_folder(folder: Path) -> dict[str, torch.Tensor]:
    """Module -> float32 weight, for every module with a `weight_scale_inv`.

    Raises AssertionError where transformers would not convert a module, or the scales do not cover its blocks.
    """
    fields = json.loads((folder / "config.json").read_text())["quantization_config"]
    config = transformers.FineGrainedFP8Config(**fields)
    tensors = {k: v for path in sorted(folder.glob("*.safetensors")) for k, v in load_file(path).items()}
    modules = [n.removesuffix(SCALE) for n in tensors if n.endswith(SCALE)]
    for module in modules:
        converted = quantizers.should_convert_module(module, config.modules_to_not_convert)
        assert converted, f"transformers would not convert {module}"
    block = tuple(config.weight_block_size)
    return {m: _dequantize(tensors[f"{m}.weight"], tensors[m + SCALE], block) for m in modules}


def _dequantize(weight: torch.Tensor, scales: torch.Tensor, block: tuple[int, ...]) -> torch.Tensor:
    """transformers takes the size of a block to be that of the weight over that of the scales, which is wrong for a
    short last block."""
    grid = [-(-size // side) for size, side in zip(weight.shape, block, strict=True)]
    assert list(scales.shape) == grid, f"scales are {list(scales.shape)}, expected {grid}"
    if all(size % side == 0 for size, side in zip(weight.shape, block, strict=True)):
        whole: torch.Tensor = fp8.Fp8Dequantize(None)._dequantize_one(weight, scales, torch.float32)
        return whole
    reader = blocks.FP8BlockDequantizer(weight_block_size=block, dtype=torch.float32)
    ragged: torch.Tensor = reader.process({"m.weight": weight, "m.weight_scale_inv": scales})["m.weight"]
    return ragged
