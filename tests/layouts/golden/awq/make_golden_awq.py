"""Write the golden files beside this script with GPTQModel 7.7.0 (PROVENANCE.md says what is what):

python make_golden_awq.py
"""

import importlib
import json
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import load_file, save_file

HERE: Final = Path(__file__).parent
INPUTS: Final = HERE.parent / "compressed_tensors" / "inputs"
ROWS, COLUMNS, BITS = 24, 256, 4
Tensors = dict[str, torch.Tensor]


def take_codes(weight: torch.Tensor, group: int, symmetric: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, zero points and scales as auto-round's own functions give them in float32."""
    functions: Any = importlib.import_module("auto_round.data_type.int")
    quantize = functions.quant_tensor_sym if symmetric else functions.quant_tensor_asym
    dequantized, scale, zero = quantize(weight.float(), bits=BITS, group_size=group)
    scales = scale.reshape(ROWS, -1).float()
    zeros = torch.full_like(scales, zero) if symmetric else zero.reshape(ROWS, -1).float()
    steps = dequantized.reshape(ROWS, -1, group) / scales[..., None] + zeros[..., None]
    return steps.round().reshape(ROWS, COLUMNS), zeros, scales


def random_codes(group: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, zero points and scales that come from no weight."""
    rng = torch.Generator().manual_seed(20261122)
    codes = torch.randint(0, 16, (ROWS, COLUMNS), generator=rng).float()
    zeros = torch.randint(0, 16, (ROWS, COLUMNS // group), generator=rng).float()
    return codes, zeros, torch.rand(ROWS, COLUMNS // group, generator=rng).half().float() + 0.5


def pack(codes: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor, group: int) -> Tensors:
    """What GPTQModel packs for weights that these codes stand for."""
    kernel: Any = importlib.import_module("gptqmodel.nn_modules.qlinear.torch_awq").AwqTorchLinear
    linear = torch.nn.Linear(COLUMNS, ROWS, bias=False)
    linear.weight.data = ((codes.reshape(ROWS, -1, group) - zeros[..., None]) * scales[..., None]).reshape(
        ROWS, COLUMNS
    )
    packed = kernel(
        bits=BITS, group_size=group, sym=False, desc_act=False, in_features=COLUMNS, out_features=ROWS, bias=False,
    )  # fmt: skip
    packed.pack(linear, scales, zeros)
    return {k: getattr(packed, k).contiguous() for k in ("qweight", "qzeros", "scales")}


def check(tensors: Tensors, codes: torch.Tensor, zeros: torch.Tensor, config: dict[str, Any]) -> None:
    """compressed-tensors' reader finds the same codes, and the readers' config classes take the config."""
    converter: Any = importlib.import_module(
        "compressed_tensors.entrypoints.convert.converters.autoawq"
    ).AutoAWQConverter
    helpers: Any = importlib.import_module("compressed_tensors.compressors.pack_quantized.helpers")
    reader = converter.from_autoawq_config(config)
    out = reader.process({f"a.{k}": v.clone() for k, v in tensors.items()})
    read = helpers.unpack_from_int32(out["a.weight_packed"], BITS, codes.shape)
    assert torch.equal(read.float() + 8, codes)
    read = helpers.unpack_from_int32(out["a.weight_zero_point"], BITS, zeros.shape, packed_dim=0)
    assert torch.equal(read.float() + 8, zeros)
    awq: Any = importlib.import_module("transformers").AwqConfig
    assert awq(**{k: v for k, v in config.items() if k != "quant_method"}).to_dict()["version"] == "gemm"


def main() -> None:
    """Make every case."""
    weight = load_file(INPUTS / "BF16.safetensors")["plain"]
    tensors: Tensors = {}
    cases: dict[str, Any] = {}
    for name, group in (("random-G64", 64), ("sym-G32", 32), ("sym-G128", 128), ("asym-G32", 32), ("asym-G128", 128)):
        random = name.startswith("random")
        codes, zeros, scales = random_codes(group) if random else take_codes(weight, group, name.startswith("sym"))
        config = {
            "quant_method": "awq", "bits": BITS, "group_size": group, "zero_point": True, "version": "gemm",
            "modules_to_not_convert": ["lm_head", "model.layers.0.mlp.gate"],
        }  # fmt: skip
        packed = pack(codes, zeros, scales, group)
        check(packed, codes, zeros, config)
        given = {"codes": codes.to(torch.uint8), "zeros": zeros.to(torch.uint8), "scales_given": scales}
        tensors |= {f"{name}.{k}": v.contiguous() for k, v in {**packed, **given}.items()}
        cases[name] = {"input": None if random else "plain", "quantization_config": config}
    (HERE / "gemm").mkdir(exist_ok=True)
    save_file(tensors, HERE / "gemm" / "BF16.safetensors", metadata={"format": "pt"})
    (HERE / "cases.json").write_text(json.dumps(cases, indent=1) + "\n")


if __name__ == "__main__":
    main()
