"""Write the golden files of small floats in auto-round's layout with auto-round's own functions:

    python make_golden_ar_floats.py

in an environment with auto-round 0.16.1; see PROVENANCE.md of the folder above.
"""

import importlib
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import load_file, save_file

HERE: Final = Path(__file__).parent
INPUTS: Final = HERE.parents[1] / "compressed_tensors" / "inputs"
model_free: Any = importlib.import_module("auto_round.utils.model_free_utils")
types: Any = importlib.import_module("auto_round.data_type.utils")
qlinear_int: Any = importlib.import_module("auto_round.export.export_to_autoround.qlinear_int")
Tensors = dict[str, torch.Tensor]
ROWS_BELOW_POWERS: Final = 16


def below_powers() -> torch.Tensor:
    """[16, 256] float32 whose groups have largest magnitudes a few units below powers of two, as only float32 has them:
    there auto-round's exponent depends on how log2 is rounded."""
    rng = torch.Generator().manual_seed(20261128)
    weight = torch.rand(ROWS_BELOW_POWERS, 256, generator=rng) * 2 - 1
    grouped = weight.reshape(-1, 32)
    powers = torch.arange(len(grouped)) % 40 - 24
    grouped *= torch.ldexp(torch.full(powers.shape, 0.9), powers)[:, None]
    units = torch.tensor([1, 2, 3, 5, 8, 13, 21, 34])[torch.arange(len(grouped)) // 16]
    grouped[:, 7] = torch.ldexp(1 - units * 2.0**-24, powers)
    return weight


def pack_mx_int(weight: torch.Tensor, module: str) -> Tensors:
    """MXINT4 as auto-round's whole-model flow writes it, by plain round-to-nearest."""
    quantize, _ = types.get_quant_func("mx_int", 4, sym=True, disable_opt_rtn=True, iters=0)
    rounded, exponents, _ = quantize(weight, bits=4, group_size=32, data_type="mx_int4")
    rows, columns = weight.shape
    linear = torch.nn.Linear(columns, rows, bias=False, dtype=weight.dtype)
    linear.weight = torch.nn.Parameter(rounded, requires_grad=False)
    packed = qlinear_int.QuantLinear(4, 32, columns, rows, False, data_type="mx_int4", act_bits=4)
    packed.pack(linear, exponents.reshape(rows, columns // 32).float(), device="cpu")
    return {f"{module}.{k}": getattr(packed, k) for k in ("weight_packed", "weight_scale")}


def cases_of(name: str, weight: torch.Tensor) -> Tensors:
    """All modules made from one weight."""
    tensors: Tensors = {}
    for bits in (4, 8):
        tensors |= model_free._quantize_weight_mxfp(weight, f"MXFP{bits}-{name}", bits, 32, "mx_fp", "cpu", True)
    tensors |= model_free._pack_weight_nvfp4_e5m3(weight, f"NVFP4_E5M3-{name}", 16, "cpu", True)
    return tensors | pack_mx_int(weight, f"MXINT4-{name}")


def main() -> None:
    """Make every file."""
    for dtype in ("BF16", "F16", "F32"):
        weights = load_file(INPUTS / f"{dtype}.safetensors")
        tensors: Tensors = {}
        for name in ("plain", "extreme"):
            tensors |= cases_of(name, weights[name])
        if dtype == "F32":
            near = below_powers()
            tensors |= {"below.weight": near} | cases_of("below", near)
        save_file({k: v.contiguous() for k, v in tensors.items()}, HERE / f"{dtype}.safetensors")


if __name__ == "__main__":
    main()
