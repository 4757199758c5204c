"""What the formats' own libraries make of a case, in float32; each needs its library."""

from collections.abc import Callable
from importlib import import_module
from typing import Any, Final

import torch

Tensors = dict[str, torch.Tensor]
Reader = Callable[[Tensors, dict[str, Any], dict[str, Any]], torch.Tensor]


def by_leaf(tensors: Tensors) -> Tensors:
    """By the last part of the name."""
    return {name.rpartition(".")[2]: t for name, t in tensors.items()}


def read_transformers(tensors: Tensors, _config: dict[str, Any], _args: dict[str, Any]) -> torch.Tensor:
    """`Fp8Dequantize` of transformers, whose output type is float32 here."""
    kernel: Any = import_module("transformers.integrations.finegrained_fp8").Fp8Dequantize(None)
    codes, scales = tensors.values()
    weight: torch.Tensor = kernel._dequantize_one(codes, scales, torch.float32)
    return weight


def read_deepseek(tensors: Tensors, _config: dict[str, Any], args: dict[str, Any]) -> torch.Tensor:
    """The formula of DeepSeek-V3's published `weight_dequant`, in float32: there is no reader that takes such grids."""
    codes, scales = list(tensors.values())[:2]
    step = torch.exp2(scales.float() - 127) if scales.dtype == torch.uint8 else scales.float()
    rows, columns = codes.shape
    high, wide = args["block"]
    step = step.reshape(-(-rows // high), -(-columns // wide))
    step = step.repeat_interleave(high, 0)[:rows].repeat_interleave(wide, 1)[:, :columns]
    return codes.float() * step


def read_compressed_tensors(tensors: Tensors, config: dict[str, Any], _args: dict[str, Any]) -> torch.Tensor:
    """The compressor of compressed-tensors, with scales widened first, so that it computes in float32."""
    compressors: Any = import_module("compressed_tensors.compressors")
    quantization: Any = import_module("compressed_tensors.quantization")
    parsed = quantization.QuantizationConfig.model_validate(config["quantization_config"])
    (scheme,) = parsed.config_groups.values()
    state = by_leaf(tensors)
    if parsed.format == "nvfp4-pack-quantized":  # the compressor itself would round to bfloat16
        fp4: Any = import_module("compressed_tensors.compressors.nvfp4.helpers")
        forward: Any = import_module("compressed_tensors.quantization.lifecycle.forward")
        rows, half = state["weight_packed"].shape
        codes = fp4.unpack_fp4_from_uint8(state["weight_packed"], rows, 2 * half, torch.float32)
        weight: torch.Tensor = forward.dequantize(
            codes,
            state["weight_scale"].float(),
            args=scheme.weights,
            dtype=torch.float32,
            global_scale=state["weight_global_scale"],
        )
        return weight
    if state["weight_scale"].is_floating_point():
        state["weight_scale"] = state["weight_scale"].float()
    weight = compressors.BaseCompressor.get_value_from_registry(parsed.format).decompress(state, scheme)["weight"]
    return weight.float()


def read_gpt_oss(tensors: Tensors, _config: dict[str, Any], _args: dict[str, Any]) -> torch.Tensor:
    """`convert_moe_packed_tensors` of transformers in float32, which returns [experts, in, out]."""
    convert: Any = import_module("transformers.integrations.mxfp4").convert_moe_packed_tensors
    blocks, scales = tensors.values()
    weight: torch.Tensor = convert(blocks, scales, dtype=torch.float32)
    return weight.transpose(1, 2).contiguous()


def read_modelopt(tensors: Tensors, _config: dict[str, Any], _args: dict[str, Any]) -> torch.Tensor:
    """The formula of Model-Optimizer's `NVFP4QTensor.dequantize`: value * (e4m3 * scale_2)."""
    codes, scale, above = list(tensors.values())[:3]
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
    unpacked = values[torch.stack([codes & 15, codes >> 4], -1).long()].flatten(-2)
    per_block = scale.float() * above.reshape(*above.shape, *(1,) * (scale.ndim - above.ndim))
    return unpacked * per_block.repeat_interleave(16, -1)


def read_gptqmodel(tensors: Tensors, _config: dict[str, Any], args: dict[str, Any]) -> torch.Tensor:
    """`TorchLinear.dequantize_weight` of GPTQModel, its scales widened; version 1 converted first by its own code."""
    kernel: Any = import_module("gptqmodel.nn_modules.qlinear.torch").TorchLinear
    convert: Any = import_module("gptqmodel.utils.model").convert_gptq_v1_to_v2_format_module
    state = by_leaf(tensors)
    rows, columns = state["qweight"].shape[1], len(state["g_idx"])
    module = kernel(
        bits=args["bits"], group_size=args["group"], sym=False, desc_act=True, in_features=columns, out_features=rows,
        bias=False, pack_dtype=torch.int32, register_buffers=True,
    )  # fmt: skip
    for name, tensor in state.items():
        setattr(module, name, tensor.float() if name == "scales" else tensor.clone())
    if args["version"] == 1:
        convert(module, bits=args["bits"], pack_dtype=torch.int32)
    module.post_init()
    weight: torch.Tensor = module.dequantize_weight()
    return weight.T.contiguous().float()


def read_auto_round(tensors: Tensors, _config: dict[str, Any], args: dict[str, Any]) -> torch.Tensor:
    """auto-round's QuantLinear, applied to the unit matrix: each sum has one term that is not zero. Scales widened."""
    module: Any = import_module(f"auto_round_extension.torch.{args['module']}")
    state = by_leaf(tensors)
    rows = state["qweight"].shape[1]
    columns = state["qweight"].shape[0] * 32 // args["bits"]
    linear = module.QuantLinear(args["bits"], args["group"], columns, rows, False)
    for name in ("qweight", "qzeros", "scales"):
        setattr(linear, name, state[name].float() if name == "scales" else state[name].clone())
    linear.post_init()
    weight: torch.Tensor = linear(torch.eye(columns))
    return weight.T.contiguous()


def read_awq(tensors: Tensors, _config: dict[str, Any], args: dict[str, Any]) -> torch.Tensor:
    """`AutoAWQConverter` and the pack-quantized compressor of compressed-tensors, scales widened."""
    converters: Any = import_module("compressed_tensors.entrypoints.convert.converters.autoawq")
    config = args["config"]
    done = by_leaf(converters.AutoAWQConverter.from_autoawq_config(config).process(dict(tensors)))
    weights = {
        "num_bits": 4, "type": "int", "symmetric": False, "strategy": "group", "group_size": config["group_size"]
    }  # fmt: skip
    group = {"targets": ["Linear"], "weights": weights, "format": "pack-quantized"}
    block = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"g": group}}
    return read_compressed_tensors(done, {"quantization_config": block}, {})


def read_bitsandbytes4(tensors: Tensors, _config: dict[str, Any], _args: dict[str, Any]) -> torch.Tensor:
    """`dequantize_4bit` of bitsandbytes on the CPU, to float32."""
    functional: Any = import_module("bitsandbytes.functional")
    codes, *parts = tensors.items()
    state = functional.QuantState.from_dict(dict(parts), torch.device("cpu"))
    state.dtype = torch.float32
    weight: torch.Tensor = functional.dequantize_4bit(codes[1], state)
    return weight


def read_bitsandbytes8(tensors: Tensors, _config: dict[str, Any], _args: dict[str, Any]) -> torch.Tensor:
    """`int8_vectorwise_dequant` of bitsandbytes."""
    import_module("bitsandbytes")
    state = by_leaf(tensors)
    weight: torch.Tensor = torch.ops.bitsandbytes.int8_vectorwise_dequant.default(state["weight"], state["SCB"])
    return weight


def read_mlx(tensors: Tensors, _config: dict[str, Any], args: dict[str, Any]) -> torch.Tensor:
    """`mx.dequantize` on the CPU, scales and biases widened."""
    mx: Any = import_module("mlx.core")
    mx.set_default_device(mx.cpu)
    state = {k: mx.array((v.float() if v.dtype == torch.bfloat16 else v).numpy()) for k, v in by_leaf(tensors).items()}
    found = mx.dequantize(
        state["weight"], state["scales"], state.get("biases"), args["group"], args["bits"], args["mode"],
        dtype=mx.float32,
    )  # fmt: skip
    numpy: Any = import_module("numpy")
    return torch.from_numpy(numpy.array(found))


PEERS: Final = {  # reader -> package that it needs, None: none
    "transformers": "transformers", "deepseek": None, "compressed_tensors": "compressed_tensors",
    "gpt_oss": "transformers", "modelopt": None, "gptqmodel": "gptqmodel", "auto_round": "auto_round",
    "awq": "compressed_tensors", "bitsandbytes4": "bitsandbytes", "bitsandbytes8": "bitsandbytes", "mlx": "mlx.core",
}  # fmt: skip
READERS: Final[dict[str, Reader]] = {
    "transformers": read_transformers, "deepseek": read_deepseek, "compressed_tensors": read_compressed_tensors,
    "gpt_oss": read_gpt_oss, "modelopt": read_modelopt, "gptqmodel": read_gptqmodel, "auto_round": read_auto_round,
    "awq": read_awq, "bitsandbytes4": read_bitsandbytes4, "bitsandbytes8": read_bitsandbytes8, "mlx": read_mlx,
}  # fmt: skip
