"""Codes of one byte with scales, and small floats: FP8, MX, NVFP4 and INT8 of all kinds."""

from typing import Final

import torch
from encoded_draws import (  # type: ignore[import-not-found,unused-ignore]
    STACK,
    Case,
    ct_config,
    e4m3,
    e8m0,
    float_weights,
    int_weights,
    octets,
    of_module,
    powers,
    small_scales,
    steps,
)

SCALED: Final = (
    Case(
        "fp8_block",
        "even",
        "transformers",
        lambda g: of_module(weight=e4m3(g, 48, 80), weight_scale_inv=steps(g, 3, 5)),
    ),
    Case(
        "fp8_block",
        "ragged",
        "deepseek",
        lambda g: of_module(weight=e4m3(g, 40, 72), weight_scale_inv=steps(g, 3, 5)),
        args={"block": [16, 16]},
    ),
    Case(
        "fp8_block",
        "ragged_bf16",
        "deepseek",
        lambda g: of_module(weight=e4m3(g, 41, 67), weight_scale_inv=steps(g, 6, 9).bfloat16()),
        args={"block": [8, 8]},
    ),
    Case(
        "fp8_block",
        "ct",
        "compressed_tensors",
        lambda g: of_module(weight=e4m3(g, 40, 72), weight_scale=steps(g, 3, 5)),
        ct_config(float_weights(8, strategy="block", block_structure=[16, 16]), "float-quantized"),
    ),
    Case(
        "fp8_block_ue8m0",
        "even_u8",
        "transformers",
        lambda g: of_module(weight=e4m3(g, 48, 80), weight_scale_inv=powers(g, 3, 5)),
    ),
    Case(
        "fp8_block_ue8m0",
        "even",
        "transformers",
        lambda g: of_module(weight=e4m3(g, 48, 80), weight_scale_inv=e8m0(g, 3, 5)),
    ),
    Case(
        "fp8_block_ue8m0",
        "ragged",
        "deepseek",
        lambda g: of_module(weight=e4m3(g, 40, 72), weight_scale_inv=e8m0(g, 3, 5)),
        args={"block": [16, 16]},
    ),
    Case("fp8_v4", "even", "transformers", lambda g: of_module(weight=e4m3(g, 48, 80), scale=e8m0(g, 3, 5))),
    Case(
        "fp8_3d",
        "blocks",
        "transformers",
        lambda g: {f"{STACK}.down_proj": e4m3(g, 3, 48, 80), f"{STACK}.down_proj_scale_inv": steps(g, 3, 3, 5)},
        weight=f"{STACK}.down_proj",
    ),
    Case(
        "fp8_3d",
        "scalars",
        "transformers",
        lambda g: {f"{STACK}.down_proj": e4m3(g, 3, 40, 72), f"{STACK}.down_proj_scale_inv": steps(g, 3, 1, 1)},
        weight=f"{STACK}.down_proj",
    ),
    Case(
        "fp8_static",
        "tensor",
        "compressed_tensors",
        lambda g: of_module(weight=e4m3(g, 40, 72), weight_scale=steps(g, 1), input_scale=steps(g, 1)),
        ct_config(float_weights(8, strategy="tensor"), "float-quantized"),
    ),
    Case(
        "fp8_static",
        "qscale",
        "deepseek",
        lambda g: of_module(weight=e4m3(g, 40, 72), qscale_weight=steps(g).bfloat16(), qscale_act=steps(g)),
        args={"block": [40, 72]},
    ),
    Case(
        "fp8_channel",
        "bf16",
        "compressed_tensors",
        lambda g: of_module(weight=e4m3(g, 40, 72), weight_scale=steps(g, 40, 1).bfloat16()),
        ct_config(float_weights(8, strategy="channel"), "float-quantized"),
    ),
    Case(
        "fp8_channel",
        "fp32",
        "compressed_tensors",
        lambda g: of_module(weight=e4m3(g, 40, 72), weight_scale=steps(g, 40, 1)),
        ct_config(float_weights(8, strategy="channel"), "float-quantized"),
    ),
    # compressed-tensors multiplies in bf16, which rounds what is as small as 2^-127
    Case(
        "mxfp8",
        "ct",
        "compressed_tensors",
        lambda g: of_module(weight=e4m3(g, 40, 96), weight_scale=powers(g, 40, 3).clamp(min=100)),
        ct_config(
            float_weights(8, strategy="group", group_size=32, scale_dtype="torch.uint8", zp_dtype="torch.uint8"),
            "mxfp8-quantized",
        ),
    ),
    Case(
        "mxfp8", "inv", "transformers", lambda g: of_module(weight=e4m3(g, 40, 96), weight_scale_inv=powers(g, 40, 3))
    ),
    Case(
        "mxfp8",
        "ragged",
        "deepseek",
        lambda g: of_module(weight=e4m3(g, 40, 72), weight_scale_inv=powers(g, 40, 3)),
        args={"block": [1, 32]},
    ),
    Case(
        "int8_channel",
        "symmetric",
        "compressed_tensors",
        lambda g: of_module(weight=octets(g, 40, 72).view(torch.int8), weight_scale=steps(g, 40, 1)),
        ct_config(int_weights(8, None, True), "int-quantized"),
    ),
    Case(
        "int8_channel",
        "asymmetric",
        "compressed_tensors",
        lambda g: of_module(
            weight=octets(g, 40, 72).view(torch.int8),
            weight_scale=steps(g, 40, 1),
            weight_zero_point=octets(g, 40, 1).view(torch.int8),
        ),
        ct_config(int_weights(8, None, False), "int-quantized"),
    ),
    Case(
        "bnb8",
        "rows",
        "bitsandbytes8",
        lambda g: of_module(
            weight=octets(g, 40, 72).view(torch.int8),
            SCB=steps(g, 40),
            weight_format=torch.tensor(0, dtype=torch.uint8),
        ),
    ),
    Case(
        "mxfp4_ct",
        "group32",
        "compressed_tensors",
        lambda g: of_module(weight_packed=octets(g, 40, 48), weight_scale=powers(g, 40, 3)),
        ct_config(
            float_weights(4, strategy="group", group_size=32, scale_dtype="torch.uint8", zp_dtype="torch.uint8"),
            "mxfp4-pack-quantized",
        ),
    ),
    Case(
        "mxfp6_ct",
        "group32",
        "compressed_tensors",
        lambda g: of_module(weight_packed=octets(g, 40, 72), weight_scale=powers(g, 40, 3)),
        ct_config(
            float_weights(6, strategy="group", group_size=32, scale_dtype="torch.uint8", zp_dtype="torch.uint8"),
            "mxfp6-pack-quantized",
        ),
    ),
    Case(
        "mxfp4_gptoss",
        "stack",
        "gpt_oss",
        lambda g: {
            f"{STACK}.gate_up_proj_blocks": octets(g, 3, 40, 2, 16),
            f"{STACK}.gate_up_proj_scales": powers(g, 3, 40, 2),
        },
        weight=f"{STACK}.gate_up_proj",
    ),
    Case(
        "mxfp4_v4",
        "int8",
        "transformers",
        lambda g: of_module(weight=octets(g, 40, 48).view(torch.int8), scale=e8m0(g, 40, 3)),
    ),
    Case(
        "nvfp4_ct",
        "group16",
        "compressed_tensors",
        lambda g: of_module(
            weight_packed=octets(g, 40, 40),
            weight_scale=small_scales(g, 40, 5),
            weight_global_scale=steps(g, 1) * 1e4,
            input_global_scale=steps(g, 1),
        ),
        ct_config(float_weights(4, strategy="tensor_group", group_size=16), "nvfp4-pack-quantized"),
    ),
    Case(
        "nvfp4_modelopt",
        "group16",
        "modelopt",
        lambda g: of_module(
            weight=octets(g, 40, 40),
            weight_scale=small_scales(g, 40, 5),
            weight_scale_2=steps(g) / 1e3,
            input_scale=steps(g),
        ),
    ),
    Case(
        "nvfp4_bare",
        "matrix",
        "modelopt",
        lambda g: {
            f"{STACK}.w2": octets(g, 40, 40),
            f"{STACK}.w2.scale": small_scales(g, 40, 5),
            f"{STACK}.w2.scale2": steps(g) / 1e3,
            f"{STACK}.w2.input_amax": steps(g),
        },
        weight=f"{STACK}.w2",
    ),
    Case(
        "nvfp4_bare",
        "stack",
        "modelopt",
        lambda g: {
            f"{STACK}.w13": octets(g, 3, 40, 40),
            f"{STACK}.w13.scale": small_scales(g, 3, 40, 5),
            f"{STACK}.w13.scale2": steps(g, 3) / 1e3,
            f"{STACK}.w13.original_shape": torch.tensor([3, 40, 80]),
        },
        weight=f"{STACK}.w13",
    ),
)
