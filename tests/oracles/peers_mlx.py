"""An MLX checkpoint as mlx-lm's own loader and mlx read it (mlx 0.32.4, mlx-lm 0.32.2)."""

from importlib import import_module
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

mx: Any = import_module("mlx.core")
nn: Any = import_module("mlx.nn")
switch: Any = import_module("mlx_lm.models.switch_layers")
loading: Any = import_module("mlx_lm.utils")

QUANTIZED: Final = (nn.QuantizedLinear, nn.QuantizedEmbedding, switch.QuantizedSwitchLinear)


def read_folder(folder: Path) -> dict[str, torch.Tensor]:
    """Module -> float32 weight, by MLX's names; experts are stacked as [experts, rows, columns].

    Raises ValueError where the model's own code finds a tensor too many, too few or of another shape.
    """
    mx.set_default_device(mx.cpu)
    model, _ = loading.load_model(folder, strict=True)
    found = {name: module for name, module in model.named_modules() if isinstance(module, QUANTIZED)}
    return {name: _dequantize(module) for name, module in found.items()}


def _dequantize(module: Any) -> torch.Tensor:
    scales, biases = module.scales, module.get("biases")
    if biases is not None:
        scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
    weight = mx.dequantize(
        module.weight, scales, biases, module.group_size, module.bits, mode=module.mode, dtype=mx.float32
    )
    return torch.from_numpy(np.array(weight))
