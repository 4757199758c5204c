"""What `inspect` makes of quantized checkpoints that others wrote: headers and configurations as they write them."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import shardq
from shardq.files.safetensors import TensorSpec, plan_file

ROWS, COLUMNS = 256, 512
Tensors = Mapping[str, tuple[str, tuple[int, ...]]]
AFFINE = {"group_size": 64, "bits": 4, "mode": "affine"}
CT_WEIGHTS = {
    "num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128, "dynamic": False,
    "actorder": None, "block_structure": None, "observer": "minmax", "observer_kwargs": {},
}  # fmt: skip
CT_TOKENS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True, "observer": None}


def ct(weights: Mapping[str, Any], inputs: Mapping[str, Any] | None, form: str) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": {**CT_WEIGHTS, **weights}, "input_activations": inputs}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": group}, "ignore": []}


def write(folder: Path, tensors: Tensors, config: Mapping[str, Any]) -> int:
    """A checkpoint with one more tensor, a norm, and weights of zeros that take no disk; bytes of its tensors."""
    specs = [TensorSpec(n, d, s) for n, (d, s) in {**tensors, "model.norm.weight": ("BF16", (COLUMNS,))}.items()]
    planned = plan_file(specs)
    with (folder / "model.safetensors").open("wb") as f:
        f.write(planned.header)
        f.truncate(planned.size_bytes)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    return sum(end - begin for begin, end in planned.offsets.values())


MODULE = "model.layers.0.mlp.up_proj"
FOREIGN: dict[str, tuple[str | None, str, dict[str, Any], dict[str, tuple[str, tuple[int, ...]]]]] = {
    "AutoAWQ": (
        "awq", "W4A16-ASYM",
        {"quantization_config": {
            "quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm",
            "modules_to_not_convert": None,
        }},
        {"qweight": ("I32", (COLUMNS, ROWS // 8)), "qzeros": ("I32", (4, ROWS // 8)), "scales": ("F16", (4, ROWS))},
    ),
    "AutoGPTQ without a format": (
        "gptq", "W4A16",
        {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": True}},
        {
            "qweight": ("I32", (COLUMNS // 8, ROWS)), "qzeros": ("I32", (4, ROWS // 8)), "scales": ("F16", (4, ROWS)),
            "g_idx": ("I32", (COLUMNS,)), "bias": ("F16", (ROWS,)),
        },
    ),
    "llm-compressor, integers": (
        "compressed-tensors", "W4A16",
        {"quantization_config": ct({}, None, "pack-quantized")},
        {
            "weight_packed": ("I32", (ROWS, COLUMNS // 8)), "weight_scale": ("BF16", (ROWS, 4)),
            "weight_shape": ("I64", (2,)),
        },
    ),
    "llm-compressor, int8": (
        "compressed-tensors", "int8 row with dynamic activations",  # its group has keys of its own
        {"quantization_config": ct(
            {"num_bits": 8, "strategy": "channel", "group_size": None}, CT_TOKENS, "int-quantized"
        )},
        {"weight": ("I8", (ROWS, COLUMNS)), "weight_scale": ("BF16", (ROWS, 1))},
    ),
    "llm-compressor, NVFP4": (
        "compressed-tensors", "fp4 g16",
        {"quantization_config": ct(
            {"type": "float", "strategy": "tensor_group", "group_size": 16}, None, "nvfp4-pack-quantized"
        )},
        {
            "weight_packed": ("U8", (ROWS, COLUMNS // 2)), "weight_scale": ("F8_E4M3", (ROWS, COLUMNS // 16)),
            "weight_global_scale": ("F32", (1,)),
        },
    ),
    "DeepSeek": (
        "fp8", "FP8-BLOCK",
        {"quantization_config": {
            "quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [128, 128],
        }},
        {"weight": ("F8_E4M3", (ROWS, COLUMNS)), "weight_scale_inv": ("F32", (2, 4))},
    ),
    "mlx-community": (
        "mlx", "W4A16G64-ASYM",
        {"quantization": {"group_size": 64, "bits": 4}},
        {
            "weight": ("U32", (ROWS, COLUMNS // 8)), "scales": ("BF16", (ROWS, COLUMNS // 64)),
            "biases": ("BF16", (ROWS, COLUMNS // 64)),
        },
    ),
    "mlx-community, mixed": (
        "mlx", "W6A16G64-ASYM",
        {key: {**AFFINE, MODULE: {"group_size": 64, "bits": 6}} for key in ("quantization", "quantization_config")},
        {
            "weight": ("U32", (ROWS, COLUMNS * 6 // 32)), "scales": ("BF16", (ROWS, COLUMNS // 64)),
            "biases": ("BF16", (ROWS, COLUMNS // 64)),
        },
    ),
    "ModelOpt": (
        None, "fp4 g16",
        {"quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4"}},
        {
            "weight": ("U8", (ROWS, COLUMNS // 2)), "weight_scale": ("F8_E4M3", (ROWS, COLUMNS // 16)),
            "weight_scale_2": ("F32", ()), "input_scale": ("F32", ()),
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("who", FOREIGN)
def test_checkpoints_of_others_are_counted_by_their_tensors(tmp_path: Path, who: str) -> None:
    layout, scheme, config, parts = FOREIGN[who]
    size_bytes = write(tmp_path, {f"{MODULE}.{leaf}": t for leaf, t in parts.items()}, config)
    found = shardq.inspect(tmp_path)
    assert found.layout == layout
    assert found.schemes == {scheme: 1}
    assert found.parameters == ROWS * COLUMNS + COLUMNS + (ROWS if "bias" in parts else 0)
    assert found.bits_per_weight == 8 * size_bytes / found.parameters
    assert bool(found.source_kinds) == (layout is None)
    roles = {r.role: r.tensors for r in found.roles}
    assert roles["quantized"] == len(parts) - ("bias" in parts)


def test_stacks_count_as_one_module_and_as_all_their_weights(tmp_path: Path) -> None:
    stack = {"weight": ("U32", (8, ROWS, COLUMNS // 8)), "scales": ("U8", (8, ROWS, COLUMNS // 32))}
    tensors = {f"model.layers.0.mlp.switch_mlp.up_proj.{leaf}": t for leaf, t in stack.items()}
    block = {"group_size": 32, "bits": 4, "mode": "mxfp4"}
    write(tmp_path, tensors, {"quantization": block, "quantization_config": block})
    found = shardq.inspect(tmp_path)
    assert (found.layout, found.schemes) == ("mlx", {"MXFP4A16": 1})
    assert found.parameters == 8 * ROWS * COLUMNS + COLUMNS


def test_experts_of_gpt_oss_are_counted(tmp_path: Path) -> None:
    blocks, name = (4, ROWS, COLUMNS // 32, 16), "model.layers.0.mlp.experts.down_proj"
    tensors = {
        f"{name}_blocks": ("U8", blocks), f"{name}_scales": ("U8", blocks[:3]), f"{name}_bias": ("BF16", (4, ROWS)),
    }  # fmt: skip
    write(tmp_path, tensors, {"quantization_config": {"quant_method": "mxfp4"}})
    found = shardq.inspect(tmp_path)
    assert (found.layout, found.schemes) == (None, {"mxfp4 g32": 1})
    assert found.parameters == 2 * math.prod(blocks) + 4 * ROWS + COLUMNS
    assert found.source_kinds == {"mxfp4_gptoss": 2}


@pytest.mark.parametrize("block", [{}, {"bits": "four"}, {"dynamic": 3, "bits": 4}, {"group_size": [1], "bits": 4}])
def test_configuration_that_says_nonsense_is_no_error(tmp_path: Path, block: Mapping[str, Any]) -> None:
    parts = FOREIGN["AutoGPTQ without a format"][3]
    tensors = {f"{MODULE}.{leaf}": t for leaf, t in parts.items()}
    write(tmp_path, tensors, {"quantization_config": {"quant_method": "gptq", **block}})
    found = shardq.inspect(tmp_path)
    assert sum(found.schemes.values()) == 1
    assert found.parameters == ROWS * COLUMNS + COLUMNS + ROWS


def test_what_codes_stand_for_is_counted_by_role(tmp_path: Path) -> None:
    """DeepSeek V4 packs two numbers into a byte, which nothing but the scale beside it tells."""
    packed = {"weight": ("I8", (ROWS, COLUMNS // 2)), "scale": ("F8_E8M0", (ROWS, COLUMNS // 32))}
    tensors = {f"layers.0.ffn.experts.{e}.w1.{leaf}": t for e in range(3) for leaf, t in packed.items()}
    write(tmp_path, tensors, {"model_type": "deepseek_v4", "quantization_config": {"quant_method": "fp8"}})
    found = shardq.inspect(tmp_path)
    assert found.weights == {"linear": 3, "norm": 1}
    assert found.parameters == 3 * ROWS * COLUMNS + COLUMNS
    assert {v.role.value for n, v in found.verdicts.items() if n.endswith(".scale")} == {"companion"}
    assert not found.warnings


def test_codes_that_no_reader_knows_are_told(tmp_path: Path) -> None:
    write(tmp_path, {f"{MODULE}.weight": ("F8_E4M3", (ROWS, COLUMNS))}, {})
    found = shardq.inspect(tmp_path)
    assert found.weights == {}
    (warning,) = found.warnings
    assert warning.startswith("Its weights cannot be read: ")
    assert f"{MODULE}.weight in model.safetensors is a quantized weight" in warning
