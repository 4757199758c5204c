"""Write the golden files beside this script with transformers 5.23.0 and compressed-tensors 0.20.0 (PROVENANCE.md says
what is what):

    python make_golden_fp8.py
"""

import importlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import torch
from safetensors.torch import load_file, save_file

HERE: Final = Path(__file__).parent
INPUTS: Final = HERE.parent / "compressed_tensors" / "inputs"
BLOCK: Final = [128, 128]
CONFIG: Final = {
    "quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": BLOCK,
    "modules_to_not_convert": ["lm_head", "model.layers.0.mlp.gate"],
}  # fmt: skip
Tensors = dict[str, torch.Tensor]


def divide(weight: torch.Tensor) -> Tensors:
    """absmax / 448 and one division, all in float32, by compressed-tensors' functions: any shape."""
    helpers: Any = importlib.import_module("compressed_tensors.quantization.utils.helpers")
    forward: Any = importlib.import_module("compressed_tensors.quantization.lifecycle.forward")
    quantization: Any = importlib.import_module("compressed_tensors.quantization")
    args = quantization.QuantizationArgs(num_bits=8, type="float", strategy="block", block_structure=BLOCK)
    padded = helpers.maybe_pad_tensor_for_block_quant(weight.float(), BLOCK)
    blocks = padded.unflatten(1, (-1, BLOCK[1])).unflatten(0, (-1, BLOCK[0]))
    scale, _ = helpers.calculate_qparams(blocks.amin((1, 3)), blocks.amax((1, 3)), args)
    codes = forward.quantize(weight.float(), scale, None, args, dtype=torch.float8_e4m3fn)
    return {"weight": codes.contiguous(), "weight_scale_inv": scale.contiguous()}


def multiply(weight: torch.Tensor) -> Tensors:
    """As transformers itself saves: the weight times (448 / absmax), whose reciprocal is stored; whole blocks only."""
    module: Any = importlib.import_module("transformers.integrations.finegrained_fp8")
    config = SimpleNamespace(weight_block_size=BLOCK, scale_fmt="float")
    op = module.Fp8Quantize(SimpleNamespace(quantization_config=config))
    out = op.convert({"m.weight": weight})
    return {k.removeprefix("m."): v.contiguous() for k, v in out.items()}


def read(tensors: Tensors) -> torch.Tensor:
    """What transformers makes of whole blocks, compressed-tensors of others, in float32."""
    rows, columns = tensors["weight"].shape
    if rows % BLOCK[0] == 0 and columns % BLOCK[1] == 0:
        module: Any = importlib.import_module("transformers.integrations.finegrained_fp8")
        out: torch.Tensor = module.Fp8Dequantize(None)._dequantize_one(
            tensors["weight"], tensors["weight_scale_inv"], torch.float32
        )
        return out
    reader: Any = importlib.import_module("compressed_tensors.entrypoints.convert.converters.fp8block_dequantizer")
    converter = reader.FP8BlockDequantizer(dtype=torch.float32)
    whole: torch.Tensor = converter.process({f"m.{k}": v for k, v in tensors.items()})["m.weight"]
    return whole


def main() -> None:
    """Make every case."""
    for config in (CONFIG, {**CONFIG, "ignored_layers": CONFIG["modules_to_not_convert"]}):
        importlib.import_module("transformers").FineGrainedFP8Config(**config)
    (HERE / "block").mkdir(exist_ok=True)
    inputs = load_file(INPUTS / "BF16.safetensors")
    whole = torch.cat([inputs["plain"][10:24].roll(i, 1) * 0.9**i for i in range(10)])[:128]  # two blocks
    save_file({"whole": whole}, HERE / "block" / "input.safetensors", metadata={"format": "pt"})
    made: dict[str, Tensors] = {}
    for name, weight, make in (
        ("whole", whole, divide), ("ragged", inputs["ragged"], divide), ("transformers", whole, multiply),
    ):  # fmt: skip
        made[name] = make(weight)
        some = {**made[name], "dequantized_every_8th_row": read(made[name])[::8].contiguous()}
        tensors = {f"{name}.{k}": v for k, v in some.items()}
        save_file(tensors, HERE / "block" / f"{name}.safetensors", metadata={"format": "pt"})
    for key in ("weight", "weight_scale_inv"):
        ours, theirs = (
            made[n][key].view(torch.uint8 if key == "weight" else torch.int32) for n in ("whole", "transformers")
        )
        print("the two rules differ in", int((ours != theirs).sum()), "of", ours.numel(), key)
    (HERE / "cases.json").write_text(json.dumps({"quantization_config": CONFIG}, indent=1) + "\n")


if __name__ == "__main__":
    main()
