"""Write mx/whole.safetensors beside this script with transformers 5.23.0 (PROVENANCE.md says what it is):

python make_golden_mxfp8.py
"""

import importlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import torch
from safetensors.torch import load_file, save_file

HERE: Final = Path(__file__).parent
CONFIG: Final = {
    "quant_method": "mxfp8", "activation_scheme": "dynamic", "weight_block_size": [1, 32], "scale_fmt": "ue8m0",
    "modules_to_not_convert": ["lm_head"],
}  # fmt: skip


def main() -> None:
    """Quantize as transformers saves, and read it as it loads: scales are bytes in files, as MiniMax-M3 has them."""
    config = importlib.import_module("transformers").FineGrainedFP8Config(**CONFIG)
    module: Any = importlib.import_module("transformers.integrations.finegrained_fp8")
    weight = load_file(HERE / "block" / "input.safetensors")["whole"]
    made = module.Fp8Quantize(SimpleNamespace(quantization_config=config)).convert({"m.weight": weight})
    codes, scales = made["m.weight"], made["m.weight_scale_inv"].view(torch.uint8)
    read = module.Fp8Dequantize(None)._dequantize_one(codes, scales, torch.float32)
    tensors = {"weight": codes, "weight_scale_inv": scales, "dequantized_every_8th_row": read[::8]}
    (HERE / "mx").mkdir(exist_ok=True)
    save_file(
        {f"whole.{k}": v.contiguous() for k, v in tensors.items()},
        HERE / "mx" / "whole.safetensors",
        metadata={"format": "pt"},
    )
    zeros = weight.reshape(-1, 32).abs().amax(1) == 0
    print(int(zeros.sum()), "groups of zeros, with the scales", set(scales.reshape(-1)[zeros].tolist()))


if __name__ == "__main__":
    main()
