"""Codes that lie in words: integers of compressed-tensors, GPTQ, AWQ and MLX; and levels of a table, which bitsandbytes
has to make."""

from collections.abc import Callable
from functools import partial
from typing import Any, Final

import torch
from encoded_draws import (  # type: ignore[import-not-found,unused-ignore]
    Case,
    Tensors,
    ct_config,
    e4m3,
    int_weights,
    of_module,
    powers,
    small_scales,
    steps,
    words,
)


def _int_pack(
    g: torch.Generator, rows: int, columns: int, bits: int, group: int | None, zeros: bool = False
) -> Tensors:
    packed = words(g, rows, -(-columns * bits // 32))
    groups = 1 if group is None else columns // group
    parts = {"weight_packed": packed, "weight_scale": steps(g, rows, groups).bfloat16()}
    parts["weight_shape"] = torch.tensor([rows, columns])
    if zeros:
        parts["weight_zero_point"] = words(g, -(-rows * bits // 32), groups)
    return of_module(**parts)


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
    return of_module(
        qweight=words(g, columns * bits // 32, rows),
        qzeros=zeros,
        scales=steps(g, groups, rows).half(),
        g_idx=g_idx.to(torch.int32),
    )


def _gptq_in_order(g: torch.Generator, bits: int, version: int) -> Tensors:
    tensors = _gptq(g, 96, 64, bits, 32, version=version)
    return {name: t for name, t in tensors.items() if not name.endswith(".g_idx")}


def _awq(g: torch.Generator, rows: int, columns: int, group: int) -> Tensors:
    groups = columns // group
    return of_module(
        qweight=words(g, columns, rows // 8), qzeros=words(g, groups, rows // 8), scales=steps(g, groups, rows).half()
    )


def _mlx(g: torch.Generator, rows: int, columns: int, bits: int, group: int, experts: int | None = None) -> Tensors:
    lead = () if experts is None else (experts,)
    scales, biases = (steps(g, *lead, rows, columns // group).bfloat16() for _ in range(2))
    packed = words(g, *lead, rows, columns * bits // 32).view(torch.uint32)
    return of_module(weight=packed, scales=-scales, biases=biases)


def _mlx_float(g: torch.Generator, rows: int, columns: int, mode: str) -> Tensors:
    bits, group = {"mxfp4": (4, 32), "nvfp4": (4, 16), "mxfp8": (8, 32)}[mode]
    packed = words(g, rows, columns * bits // 32)
    if bits == 8:
        packed = e4m3(g, rows, columns).view(torch.int32)
    count = columns // group
    scales = small_scales(g, rows, count).view(torch.uint8) if mode == "nvfp4" else powers(g, rows, count)
    return of_module(weight=packed.view(torch.uint32), scales=scales)


def _mlx_config(bits: int, group: int) -> dict[str, Any]:
    return {"quantization": {"bits": bits, "group_size": group}}


def _bnb4(quant_type: str, rows: int, columns: int, nested: bool) -> Callable[[torch.Generator], Tensors]:
    def make(g: torch.Generator) -> Tensors:
        from bitsandbytes.functional import quantize_4bit  # type: ignore[import-not-found,unused-ignore]

        weight = torch.randn(rows, columns, generator=g) * steps(g, rows, 1)
        packed, state = quantize_4bit(weight, quant_type=quant_type, compress_statistics=nested)
        parts = {f"weight.{k}": v for k, v in state.as_dict(packed=True).items()}
        return of_module(weight=packed, **parts)

    return make


GPTQ: Final = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": False}


def _gptq_config(bits: int, group: int, version: int) -> dict[str, Any]:
    word = "gptq" if version == 1 else "gptq_v2"
    return {"quantization_config": {**GPTQ, "bits": bits, "group_size": group, "checkpoint_format": word}}


AWQ: Final = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}

PACKED: Final = (
    Case(
        "int_pack",
        "sym4",
        "compressed_tensors",
        lambda g: _int_pack(g, 40, 96, 4, 32),
        ct_config(int_weights(4, 32, True), "pack-quantized"),
    ),
    Case(
        "int_pack",
        "asym4",
        "compressed_tensors",
        lambda g: _int_pack(g, 37, 96, 4, 32, zeros=True),
        ct_config(int_weights(4, 32, False), "pack-quantized"),
    ),
    Case(
        "int_pack",
        "asym3",
        "compressed_tensors",
        lambda g: _int_pack(g, 41, 96, 3, 16, zeros=True),
        ct_config(int_weights(3, 16, False), "pack-quantized"),
    ),
    Case(
        "int_pack",
        "channel5_ragged",
        "compressed_tensors",
        lambda g: _int_pack(g, 40, 71, 5, None),
        ct_config(int_weights(5, None, True), "pack-quantized"),
    ),
    Case(
        "int_pack",
        "channel8",
        "compressed_tensors",
        lambda g: _int_pack(g, 40, 72, 8, None, zeros=True),
        ct_config(int_weights(8, None, False), "pack-quantized"),
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
            partial(_gptq_in_order, bits=bits, version=version),
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
            partial(_mlx, rows=40, columns=192, bits=bits, group=group),
            _mlx_config(bits, group),
            {"bits": bits, "group": group, "mode": "affine"},
        )
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
            partial(_mlx_float, rows=40, columns=192, mode=mode),
            {"quantization": {"mode": mode}},
            {"bits": bits, "group": group, "mode": mode},
        )
        for mode, bits, group in (("mxfp4", 4, 32), ("mxfp8", 8, 32), ("nvfp4", 4, 16))
    ),
)
