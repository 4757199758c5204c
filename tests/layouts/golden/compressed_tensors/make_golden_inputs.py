"""Write input_scales.json: scales of activations from their largest magnitude, as the library's own functions make them
in the type of the activations:

    python make_golden_inputs.py
"""

import json
from pathlib import Path
from typing import Final

import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

HERE: Final = Path(__file__).parent
DTYPES: Final = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
LARGEST: Final = (0.0, 1e-30, 3e-5, 0.01, 0.7, 1.0, 3.14159, 127.5, 448.0, 1234.5, 60000.0)
INT8: Final = QuantizationArgs(num_bits=8, type="int", symmetric=True, strategy="tensor", dynamic=False)

found: dict[str, dict[str, list[list[float]]]] = {}
for name, args in (
    ("FP8_STATIC", preset_name_to_scheme("FP8", ["Linear"]).input_activations),
    ("W8A8_STATIC", INT8),
    ("NVFP4", preset_name_to_scheme("NVFP4", ["Linear"]).input_activations),
):
    for dtype, kind in DTYPES.items():
        rows = []
        for value in LARGEST:
            amax = torch.tensor([value], dtype=kind)
            if name == "NVFP4":
                amax = amax.float()
                scale = generate_gparam(-amax, amax)
            else:
                scale, _ = calculate_qparams(-amax, amax, args)
            rows.append([float(amax), float(scale)])
        found.setdefault(name, {})[dtype] = rows
(HERE / "input_scales.json").write_text(json.dumps(found, indent=1) + "\n")
