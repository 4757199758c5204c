"""Every kind of quantized source, as a row: how a Linear weight is stored, and what config.json says of it. Groups are
small enough for the dimensions of encoded_models.py."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final

from encoded_codes import (
    Encode,
    awq,
    bnb4,
    bnb8,
    fp8,
    gptq,
    int8,
    int_pack,
    mlx,
    mlx_mxfp4,
    mx,
    nvfp4,
)
from encoded_numbers import (
    FP4,
    NF4,
    draw_brains,
    draw_e8m0,
    draw_powers,
    draw_singles,
    draw_whole_powers,
)


@dataclass(frozen=True)
class Kind:
    """One way to store Linear weights."""

    id: str  # of the test case
    kind: str  # a key of shardq.dequantize.KINDS
    encode: Encode
    config: Mapping[str, Any]  # keys of config.json
    dtype: str = "BF16"  # of all that is not encoded, and what the kind's own reader makes of the rest
    loose: tuple[str, ...] = ()  # of each layer: numbers that belong to no weight
    side_files: Mapping[str, Any] = field(default_factory=dict)  # name -> JSON


def native_fp8(**more: Any) -> dict[str, Any]:
    """The block of native FP8."""
    block = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    return {"quantization_config": {**block, **more}}


def ct(form: str, bits: int, number: str = "float", **weights: Any) -> dict[str, Any]:
    """The block of compressed-tensors."""
    scheme = {"num_bits": bits, "type": number, "symmetric": True, "dynamic": False, "observer": "minmax", **weights}
    group = {
        "targets": ["Linear"],
        "weights": scheme,
        "input_activations": None,
        "output_activations": None,
        "format": form,
    }
    block = {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": group}}
    return {"quantization_config": {**block, "ignore": ["lm_head"], "quantization_status": "compressed"}}


def named(method: str, **more: Any) -> dict[str, Any]:
    """The block of any other method."""
    return {"quantization_config": {"quant_method": method, **more}}


def mlx_block(**block: Any) -> dict[str, Any]:
    """MLX says it twice."""
    return {"quantization": block, "quantization_config": block}


def gptq_block(word: str, desc_act: bool = False) -> dict[str, Any]:
    """The block of GPTQ."""
    return named("gptq", bits=4, group_size=32, sym=False, desc_act=desc_act, checkpoint_format=word, lm_head=False)


MX: Final[dict[str, Any]] = {
    "strategy": "group",
    "group_size": 32,
    "scale_dtype": "torch.uint8",
    "zp_dtype": "torch.uint8",
}
BNB: Final = {"load_in_4bit": True, "load_in_8bit": False, "bnb_4bit_compute_dtype": "bfloat16"}
NVFP4_CT: Final = (".weight_packed", ".weight_scale", ".weight_global_scale", ".input_global_scale")
AWQ: Final = {"bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
MODELOPT: Final = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4", "group_size": 16}}
FP8_BLOCK: Final = fp8(".weight_scale_inv", draw_singles, 128, 128)
FP8_STATIC: Final = fp8(".weight_scale_inv", draw_brains, 0, 0, ".activation_scale")
GPTQ_FILE: Final = {"quantize_config.json": {"bits": 4, "group_size": 32}}

ROWS: Final = (
    Kind("fp8_block", "fp8_block", FP8_BLOCK, native_fp8()),
    Kind("fp8_block_bf16", "fp8_block", fp8(".weight_scale_inv", draw_brains, 128, 128), native_fp8()),
    Kind(
        "fp8_block_powers",
        "fp8_block",
        fp8(".weight_scale_inv", draw_whole_powers, 128, 128),
        native_fp8(scale_fmt="ue8m0"),
    ),
    Kind(
        "fp8_block_ct",
        "fp8_block",
        fp8(".weight_scale", draw_brains, 128, 128),
        ct("float-quantized", 8, strategy="block", block_structure=[128, 128]),
    ),
    Kind(
        "fp8_block_ue8m0",
        "fp8_block_ue8m0",
        fp8(".weight_scale_inv", draw_e8m0, 128, 128),
        native_fp8(scale_fmt="ue8m0"),
    ),
    Kind(
        "fp8_block_ue8m0_u8",
        "fp8_block_ue8m0",
        fp8(".weight_scale_inv", draw_powers, 128, 128),
        native_fp8(scale_fmt="ue8m0"),
    ),
    Kind("fp8_v4", "fp8_v4", fp8(".scale", draw_e8m0, 128, 128), native_fp8(scale_fmt="ue8m0")),
    Kind(
        "fp8_static",
        "fp8_static",
        fp8(".weight_scale", draw_singles, 0, 0, ".input_scale"),
        ct("float-quantized", 8, strategy="tensor"),
        loose=("self_attn.k_scale", "self_attn.v_scale"),
    ),
    Kind("fp8_static_inv", "fp8_static", FP8_STATIC, native_fp8(activation_scheme="static", weight_block_size=None)),
    Kind(
        "fp8_channel",
        "fp8_channel",
        fp8(".weight_scale", draw_brains, 1, 0),
        ct("float-quantized", 8, strategy="channel"),
    ),
    Kind("mxfp8", "mxfp8", fp8(".weight_scale", draw_powers, 1, 32), ct("mxfp8-quantized", 8, **MX)),
    Kind("mxfp8_inv", "mxfp8", fp8(".weight_scale_inv", draw_powers, 1, 32), named("mxfp8")),
    Kind("int8_channel", "int8_channel", int8(zeros=False), ct("int-quantized", 8, "int", strategy="channel")),
    Kind(
        "int8_channel_zeros",
        "int8_channel",
        int8(zeros=True),
        ct("int-quantized", 8, "int", strategy="channel", symmetric=False),
    ),
    Kind("bnb8", "bnb8", bnb8, named("bitsandbytes", load_in_4bit=False, load_in_8bit=True)),
    Kind(
        "mxfp4_ct", "mxfp4_ct", mx(".weight_packed", ".weight_scale", draw_powers), ct("mxfp4-pack-quantized", 4, **MX)
    ),
    Kind(
        "mxfp6_ct",
        "mxfp6_ct",
        mx(".weight_packed", ".weight_scale", draw_powers, bits=6),
        ct("mxfp6-pack-quantized", 6, **MX),
    ),
    Kind(
        "mxfp4_v4",
        "mxfp4_v4",
        mx(".weight", ".scale", draw_e8m0, "I8"),
        {**native_fp8(scale_fmt="ue8m0"), "expert_dtype": "fp4"},
    ),
    Kind(
        "nvfp4_modelopt",
        "nvfp4_modelopt",
        nvfp4(".weight", ".weight_scale", ".weight_scale_2", ".input_scale"),
        named("modelopt", quant_algo="NVFP4", ignore=["lm_head"]),
        loose=("self_attn.k_proj.k_scale", "self_attn.v_proj.v_scale"),
        side_files={"hf_quant_config.json": MODELOPT},
    ),
    Kind(
        "nvfp4_ct",
        "nvfp4_ct",
        nvfp4(*NVFP4_CT, divides=True, shared=2688.5),  # as servers want it of what they run as one matrix
        ct("nvfp4-pack-quantized", 4, strategy="tensor_group", group_size=16),
    ),
    Kind("nvfp4_bare", "nvfp4_bare", nvfp4(".weight", ".weight.scale", ".weight.scale2", ".weight.input_amax"), {}),
    Kind("int_pack", "int_pack", int_pack(4, 32), ct("pack-quantized", 4, "int", strategy="group", group_size=32)),
    Kind(
        "int_pack_zeros",
        "int_pack",
        int_pack(4, 64, zeros=True),
        ct("pack-quantized", 4, "int", strategy="group", group_size=64, symmetric=False),
    ),
    Kind(
        "int_pack_3bit",
        "int_pack",
        int_pack(3, 32, zeros=True),
        ct("pack-quantized", 3, "int", strategy="group", group_size=32, symmetric=False),
    ),
    Kind("int_pack_rows", "int_pack", int_pack(8, None), ct("pack-quantized", 8, "int", strategy="channel")),
    Kind("gptq_v1", "gptq", gptq(4, 32, 1), gptq_block("gptq"), "F16", side_files=GPTQ_FILE),
    Kind("gptq_v2", "gptq", gptq(4, 32, 2), gptq_block("gptq_v2"), "F16"),
    Kind("gptq_act_order", "gptq", gptq(4, 32, 1, act_order=True), gptq_block("gptq", desc_act=True), "F16"),
    Kind("awq", "awq", awq, named("awq", **AWQ), "F16", side_files={"quant_config.json": AWQ}),
    Kind("bnb4_nf4", "bnb4", bnb4(NF4, "nf4"), named("bitsandbytes", **BNB, bnb_4bit_quant_type="nf4")),
    Kind("bnb4_fp4", "bnb4", bnb4(FP4, "fp4"), named("bitsandbytes", **BNB, bnb_4bit_quant_type="fp4")),
    Kind(
        "bnb4_nested",
        "bnb4",
        bnb4(NF4, "nf4", nested=True),
        named("bitsandbytes", **BNB, bnb_4bit_use_double_quant=True),
    ),
    Kind("mlx", "mlx", mlx(4, 64), mlx_block(group_size=64, bits=4)),
    Kind("mlx_6bit", "mlx", mlx(6, 32), mlx_block(group_size=32, bits=6)),
    Kind("mlx_mxfp4", "mlx", mlx_mxfp4, mlx_block(group_size=32, bits=4, mode="mxfp4")),
)
KINDS: Final[Mapping[str, Kind]] = MappingProxyType({row.id: row for row in ROWS})
