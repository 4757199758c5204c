"""Encoded weights of every kind, with random codes: each pattern of a code is as likely as any other.

A case is what a checkpoint would hold (tensors by name, a configuration) and the reader that knows what it stands for.
Needs torch alone, but for the kinds whose library has to make them.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

import torch

Tensors = dict[str, torch.Tensor]
MODULE: Final = "model.layers.0.q_proj"
STACK: Final = "model.layers.0.mlp.experts"


@dataclass(frozen=True)
class Case:
    """One encoded weight: `reader` is a key of peer_readers.READERS, `args` what it must be told."""

    kind: str
    name: str
    reader: str
    make: Callable[[torch.Generator], Tensors]
    config: dict[str, Any] = field(default_factory=dict)
    args: dict[str, Any] = field(default_factory=dict)
    weight: str = f"{MODULE}.weight"  # logical name

    @property
    def id(self) -> str:
        """Folder and file name."""
        return f"{self.kind}/{self.name}"


def octets(g: torch.Generator, *shape: int) -> torch.Tensor:
    """uint8 of any value."""
    return torch.randint(0, 256, shape, generator=g, dtype=torch.uint8)


def words(g: torch.Generator, *shape: int) -> torch.Tensor:
    """int32 of any value."""
    return octets(g, *shape[:-1], shape[-1] * 4).view(torch.int32)


def e4m3(g: torch.Generator, *shape: int) -> torch.Tensor:
    """Any e4m3 numbers: subnormals, both zeros, no NaN."""
    raw = octets(g, *shape)
    raw[(raw & 0x7F) == 0x7F] = 0x80
    return raw.view(torch.float8_e4m3fn)


def steps(g: torch.Generator, *shape: int) -> torch.Tensor:
    """fp32 scales of many sizes."""
    return torch.exp2(torch.randint(-14, 2, shape, generator=g)) * (1 + torch.rand(shape, generator=g))


def powers(g: torch.Generator, *shape: int) -> torch.Tensor:
    """Exponent bytes: common ones, with the smallest (2^-127, a subnormal of fp32) among them."""
    raw = torch.randint(100, 140, shape, generator=g, dtype=torch.uint8)
    return torch.where(torch.rand(shape, generator=g) < 0.05, torch.zeros((), dtype=torch.uint8), raw)


def e8m0(g: torch.Generator, *shape: int) -> torch.Tensor:
    """The same as float8_e8m0fnu."""
    return powers(g, *shape).view(torch.float8_e8m0fnu)


def small_scales(g: torch.Generator, *shape: int) -> torch.Tensor:
    """e4m3 scales: positive, some zero or subnormal."""
    return (e4m3(g, *shape).view(torch.uint8) & 0x7F).view(torch.float8_e4m3fn)


def _ct(weights: dict[str, Any], fmt: str) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "format": fmt}
    return {"quantization_config": {"quant_method": "compressed-tensors", "format": fmt, "config_groups": {"g": group}}}


def _ints(bits: int, group: int | None, symmetric: bool) -> dict[str, Any]:
    strategy = {"strategy": "channel"} if group is None else {"strategy": "group", "group_size": group}
    return {"num_bits": bits, "type": "int", "symmetric": symmetric, **strategy}


def _floats(bits: int, **more: Any) -> dict[str, Any]:
    return {"num_bits": bits, "type": "float", "symmetric": True, **more}


def _module(**parts: torch.Tensor) -> Tensors:
    return {f"{MODULE}.{k}": v for k, v in parts.items()}


def _int_pack(
    g: torch.Generator, rows: int, columns: int, bits: int, group: int | None, zeros: bool = False
) -> Tensors:
    packed = words(g, rows, -(-columns * bits // 32))
    groups = 1 if group is None else columns // group
    parts = {"weight_packed": packed, "weight_scale": steps(g, rows, groups).bfloat16()}
    parts["weight_shape"] = torch.tensor([rows, columns])
    if zeros:
        parts["weight_zero_point"] = words(g, -(-rows * bits // 32), groups)
    return _module(**parts)


def _gptq(
    g: torch.Generator, rows: int, columns: int, bits: int, group: int, act_order: bool = False, version: int = 2
) -> Tensors:
    groups = columns // group
    zeros = words(g, groups, rows * bits // 32)
    if version == 1:  # no field may be full: its readers add one to whole words
        zeros &= 0x77777777 if bits == 4 else 0x7F7F7F7F
    g_idx = torch.arange(columns) // group
    if act_order:
        g_idx = g_idx[torch.randperm(columns, generator=g)]
    return _module(
        qweight=words(g, columns * bits // 32, rows),
        qzeros=zeros,
        scales=steps(g, groups, rows).half(),
        g_idx=g_idx.to(torch.int32),
    )


def _without_g_idx(tensors: Tensors) -> Tensors:
    return {name: t for name, t in tensors.items() if not name.endswith(".g_idx")}


def _awq(g: torch.Generator, rows: int, columns: int, group: int) -> Tensors:
    groups = columns // group
    return _module(
        qweight=words(g, columns, rows // 8), qzeros=words(g, groups, rows // 8), scales=steps(g, groups, rows).half()
    )


def _mlx(g: torch.Generator, rows: int, columns: int, bits: int, group: int, experts: int | None = None) -> Tensors:
    lead = () if experts is None else (experts,)
    scales, biases = (steps(g, *lead, rows, columns // group).bfloat16() for _ in range(2))
    packed = words(g, *lead, rows, columns * bits // 32).view(torch.uint32)
    return _module(weight=packed, scales=-scales, biases=biases)


def _mlx_float(g: torch.Generator, rows: int, columns: int, mode: str) -> Tensors:
    bits, group = {"mxfp4": (4, 32), "nvfp4": (4, 16), "mxfp8": (8, 32)}[mode]
    packed = words(g, rows, columns * bits // 32)
    if bits == 8:
        packed = e4m3(g, rows, columns).view(torch.int32)
    count = columns // group
    scales = small_scales(g, rows, count).view(torch.uint8) if mode == "nvfp4" else powers(g, rows, count)
    return _module(weight=packed.view(torch.uint32), scales=scales)


def _mlx_config(bits: int, group: int) -> dict[str, Any]:
    return {"quantization": {"bits": bits, "group_size": group}}


def _bnb4(quant_type: str, rows: int, columns: int, nested: bool) -> Callable[[torch.Generator], Tensors]:
    def make(g: torch.Generator) -> Tensors:
        from bitsandbytes.functional import quantize_4bit  # type: ignore[import-not-found,unused-ignore]

        weight = torch.randn(rows, columns, generator=g) * steps(g, rows, 1)
        packed, state = quantize_4bit(weight, quant_type=quant_type, compress_statistics=nested)
        parts = {f"weight.{k}": v for k, v in state.as_dict(packed=True).items()}
        return _module(weight=packed, **parts)

    return make


GPTQ: Final = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": False}


def _gptq_config(bits: int, group: int, version: int) -> dict[str, Any]:
    word = "gptq" if version == 1 else "gptq_v2"
    return {"quantization_config": {**GPTQ, "bits": bits, "group_size": group, "checkpoint_format": word}}


AWQ: Final = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}

CASES: Final = (
    Case(
        "fp8_block",
        "even",
        "transformers",
        lambda g: _module(weight=e4m3(g, 48, 80), weight_scale_inv=steps(g, 3, 5)),
    ),
    Case(
        "fp8_block",
        "ragged",
        "deepseek",
        lambda g: _module(weight=e4m3(g, 40, 72), weight_scale_inv=steps(g, 3, 5)),
        args={"block": [16, 16]},
    ),
    Case(
        "fp8_block",
        "ragged_bf16",
        "deepseek",
        lambda g: _module(weight=e4m3(g, 41, 67), weight_scale_inv=steps(g, 6, 9).bfloat16()),
        args={"block": [8, 8]},
    ),
    Case(
        "fp8_block",
        "ct",
        "compressed_tensors",
        lambda g: _module(weight=e4m3(g, 40, 72), weight_scale=steps(g, 3, 5)),
        _ct(_floats(8, strategy="block", block_structure=[16, 16]), "float-quantized"),
    ),
    Case(
        "fp8_block_ue8m0",
        "even_u8",
        "transformers",
        lambda g: _module(weight=e4m3(g, 48, 80), weight_scale_inv=powers(g, 3, 5)),
    ),
    Case(
        "fp8_block_ue8m0",
        "even",
        "transformers",
        lambda g: _module(weight=e4m3(g, 48, 80), weight_scale_inv=e8m0(g, 3, 5)),
    ),
    Case(
        "fp8_block_ue8m0",
        "ragged",
        "deepseek",
        lambda g: _module(weight=e4m3(g, 40, 72), weight_scale_inv=e8m0(g, 3, 5)),
        args={"block": [16, 16]},
    ),
    Case("fp8_v4", "even", "transformers", lambda g: _module(weight=e4m3(g, 48, 80), scale=e8m0(g, 3, 5))),
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
        lambda g: _module(weight=e4m3(g, 40, 72), weight_scale=steps(g, 1), input_scale=steps(g, 1)),
        _ct(_floats(8, strategy="tensor"), "float-quantized"),
    ),
    Case(
        "fp8_static",
        "qscale",
        "deepseek",
        lambda g: _module(weight=e4m3(g, 40, 72), qscale_weight=steps(g).bfloat16(), qscale_act=steps(g)),
        args={"block": [40, 72]},
    ),
    Case(
        "fp8_channel",
        "bf16",
        "compressed_tensors",
        lambda g: _module(weight=e4m3(g, 40, 72), weight_scale=steps(g, 40, 1).bfloat16()),
        _ct(_floats(8, strategy="channel"), "float-quantized"),
    ),
    Case(
        "fp8_channel",
        "fp32",
        "compressed_tensors",
        lambda g: _module(weight=e4m3(g, 40, 72), weight_scale=steps(g, 40, 1)),
        _ct(_floats(8, strategy="channel"), "float-quantized"),
    ),
    # compressed-tensors multiplies in bf16, which rounds what is as small as 2^-127
    Case(
        "mxfp8",
        "ct",
        "compressed_tensors",
        lambda g: _module(weight=e4m3(g, 40, 96), weight_scale=powers(g, 40, 3).clamp(min=100)),
        _ct(
            _floats(8, strategy="group", group_size=32, scale_dtype="torch.uint8", zp_dtype="torch.uint8"),
            "mxfp8-quantized",
        ),
    ),
    Case("mxfp8", "inv", "transformers", lambda g: _module(weight=e4m3(g, 40, 96), weight_scale_inv=powers(g, 40, 3))),
    Case(
        "mxfp8",
        "ragged",
        "deepseek",
        lambda g: _module(weight=e4m3(g, 40, 72), weight_scale_inv=powers(g, 40, 3)),
        args={"block": [1, 32]},
    ),
    Case(
        "int8_channel",
        "symmetric",
        "compressed_tensors",
        lambda g: _module(weight=octets(g, 40, 72).view(torch.int8), weight_scale=steps(g, 40, 1)),
        _ct(_ints(8, None, True), "int-quantized"),
    ),
    Case(
        "int8_channel",
        "asymmetric",
        "compressed_tensors",
        lambda g: _module(
            weight=octets(g, 40, 72).view(torch.int8),
            weight_scale=steps(g, 40, 1),
            weight_zero_point=octets(g, 40, 1).view(torch.int8),
        ),
        _ct(_ints(8, None, False), "int-quantized"),
    ),
    Case(
        "bnb8",
        "rows",
        "bitsandbytes8",
        lambda g: _module(
            weight=octets(g, 40, 72).view(torch.int8),
            SCB=steps(g, 40),
            weight_format=torch.tensor(0, dtype=torch.uint8),
        ),
    ),
    Case(
        "mxfp4_ct",
        "group32",
        "compressed_tensors",
        lambda g: _module(weight_packed=octets(g, 40, 48), weight_scale=powers(g, 40, 3)),
        _ct(
            _floats(4, strategy="group", group_size=32, scale_dtype="torch.uint8", zp_dtype="torch.uint8"),
            "mxfp4-pack-quantized",
        ),
    ),
    Case(
        "mxfp6_ct",
        "group32",
        "compressed_tensors",
        lambda g: _module(weight_packed=octets(g, 40, 72), weight_scale=powers(g, 40, 3)),
        _ct(
            _floats(6, strategy="group", group_size=32, scale_dtype="torch.uint8", zp_dtype="torch.uint8"),
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
        lambda g: _module(weight=octets(g, 40, 48).view(torch.int8), scale=e8m0(g, 40, 3)),
    ),
    Case(
        "nvfp4_ct",
        "group16",
        "compressed_tensors",
        lambda g: _module(
            weight_packed=octets(g, 40, 40),
            weight_scale=small_scales(g, 40, 5),
            weight_global_scale=steps(g, 1) * 1e4,
            input_global_scale=steps(g, 1),
        ),
        _ct(_floats(4, strategy="tensor_group", group_size=16), "nvfp4-pack-quantized"),
    ),
    Case(
        "nvfp4_modelopt",
        "group16",
        "modelopt",
        lambda g: _module(
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
    Case(
        "int_pack",
        "sym4",
        "compressed_tensors",
        lambda g: _int_pack(g, 40, 96, 4, 32),
        _ct(_ints(4, 32, True), "pack-quantized"),
    ),
    Case(
        "int_pack",
        "asym4",
        "compressed_tensors",
        lambda g: _int_pack(g, 37, 96, 4, 32, zeros=True),
        _ct(_ints(4, 32, False), "pack-quantized"),
    ),
    Case(
        "int_pack",
        "asym3",
        "compressed_tensors",
        lambda g: _int_pack(g, 41, 96, 3, 16, zeros=True),
        _ct(_ints(3, 16, False), "pack-quantized"),
    ),
    Case(
        "int_pack",
        "channel5_ragged",
        "compressed_tensors",
        lambda g: _int_pack(g, 40, 71, 5, None),
        _ct(_ints(5, None, True), "pack-quantized"),
    ),
    Case(
        "int_pack",
        "channel8",
        "compressed_tensors",
        lambda g: _int_pack(g, 40, 72, 8, None, zeros=True),
        _ct(_ints(8, None, False), "pack-quantized"),
    ),
    Case(
        "gptq",
        "v1_4bit",
        "gptqmodel",
        lambda g: _gptq(g, 96, 64, 4, 32, version=1),
        _gptq_config(4, 32, 1),
        {"bits": 4, "group": 32, "version": 1},
    ),
    Case(
        "gptq",
        "v1_8bit_act_order",
        "gptqmodel",
        lambda g: _gptq(g, 64, 96, 8, 32, act_order=True, version=1),
        _gptq_config(8, 32, 1),
        {"bits": 8, "group": 32, "version": 1},
    ),
    Case(
        "gptq",
        "v2_4bit_act_order",
        "gptqmodel",
        lambda g: _gptq(g, 96, 64, 4, 32, act_order=True),
        _gptq_config(4, 32, 2),
        {"bits": 4, "group": 32, "version": 2},
    ),
    Case(
        "gptq",
        "v2_3bit",
        "gptqmodel",
        lambda g: _gptq(g, 96, 64, 3, 32),
        _gptq_config(3, 32, 2),
        {"bits": 3, "group": 32, "version": 2},
    ),
    Case(
        "gptq",
        "v2_2bit",
        "gptqmodel",
        lambda g: _gptq(g, 96, 64, 2, 32),
        _gptq_config(2, 32, 2),
        {"bits": 2, "group": 32, "version": 2},
    ),
    *(
        Case(
            "gptq",
            f"{module}_{bits}bit",
            "auto_round",
            lambda g, b=bits, v=version: _without_g_idx(_gptq(g, 96, 64, b, 32, version=v)),  # type: ignore[misc]
            {
                "quantization_config": {
                    "quant_method": "auto-round",
                    "bits": bits,
                    "group_size": 32,
                    "packing_format": w,
                }
            },
            {"bits": bits, "group": 32, "module": module},
        )
        for module, w, version in (("qlinear_torch", "auto_round", 2), ("qlinear_torch_zp", "auto_round:auto_gptq", 1))
        for bits in (4, 8)
    ),
    Case("awq", "gemm", "awq", lambda g: _awq(g, 40, 96, 32), {"quantization_config": AWQ}, {"config": AWQ}),
    *(
        Case("bnb4", f"{kind}{'_nested' if nested else ''}", "bitsandbytes4", _bnb4(kind, *shape, nested))
        for kind, shape, nested in (("nf4", (40, 70), False), ("nf4", (300, 74), True), ("fp4", (40, 70), False))
    ),
    *(
        Case(
            "mlx",
            f"affine{bits}",
            "mlx",
            lambda g, b=bits, n=group: _mlx(g, 40, 192, b, n),
            _mlx_config(bits, group),
            {"bits": bits, "group": group, "mode": "affine"},
        )  # type: ignore[misc]
        for bits, group in ((2, 32), (3, 64), (4, 64), (5, 32), (6, 32), (8, 64))
    ),
    Case(
        "mlx",
        "affine4_stack",
        "mlx",
        lambda g: _mlx(g, 40, 192, 4, 64, 3),
        _mlx_config(4, 64),
        {"bits": 4, "group": 64, "mode": "affine"},
    ),
    *(
        Case(
            "mlx",
            mode,
            "mlx",
            lambda g, m=mode: _mlx_float(g, 40, 192, m),
            {"quantization": {"mode": mode}},
            {"bits": bits, "group": group, "mode": mode},
        )  # type: ignore[misc]
        for mode, bits, group in (("mxfp4", 4, 32), ("mxfp8", 8, 32), ("nvfp4", 4, 16))
    ),
)
