"""Write the golden files beside this script with compressed-tensors 0.20.0 (PROVENANCE.md says what is what):

python make_golden_ct.py
"""

import importlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import load_file, save_file

ct: Any = importlib.import_module("compressed_tensors")
quantization: Any = importlib.import_module("compressed_tensors.quantization")
helpers: Any = importlib.import_module("compressed_tensors.quantization.utils.helpers")
compressors: Any = importlib.import_module("compressed_tensors.compressors")
match: Any = importlib.import_module("compressed_tensors.utils.match")

HERE: Final = Path(__file__).parent
DTYPES: Final = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
Tensors = dict[str, torch.Tensor]
PLAIN, EXTREME, RAGGED = "plain", "extreme", "ragged"
FUSED: Final = {"q_proj": slice(16, 20), "k_proj": slice(10, 12), "v_proj": slice(12, 16)}  # rows of plain


@dataclass(frozen=True, slots=True)
class Case:
    """One module of a golden file."""

    name: str  # of the module
    weights: dict[str, Any]  # QuantizationArgs
    inputs: dict[str, Any] | None = None  # QuantizationArgs of activations
    source: str = PLAIN
    global_scale: float | None = None


def int_args(bits: int, group: int, symmetric: bool = True) -> dict[str, Any]:
    """Integers in groups of columns, or one scale for each row where `group` is -1."""
    args: dict[str, Any] = {"num_bits": bits, "type": "int", "symmetric": symmetric, "dynamic": False}
    return {**args, "strategy": "channel"} if group == -1 else {**args, "strategy": "group", "group_size": group}


def preset(name: str, source: str = PLAIN, module: str | None = None, global_scale: float | None = None) -> Case:
    """The library's scheme of that name."""
    scheme = quantization.preset_name_to_scheme(name, ["Linear"])
    inputs = scheme.input_activations
    return Case(
        module or f"{name}-{source}",
        scheme.weights.model_dump(),
        inputs and inputs.model_dump(),
        source,
        global_scale,
    )


def pack_cases() -> list[Case]:
    """Every width, symmetric; some asymmetric; rows that fill no whole number of words."""
    groups = {32: "G32", 128: "G128", -1: "CH"}
    cases = [Case(f"W{b}-{name}", int_args(b, g)) for b in range(2, 9) for g, name in groups.items()]
    cases += [Case(f"W{b}-{name}-ASYM", int_args(b, g, False)) for b in range(2, 9) for g, name in groups.items()]
    cases += [Case(f"W{b}-CH-ragged", int_args(b, -1), source=RAGGED) for b in (3, 4)]
    return [*cases, Case("W4-G32-extreme", int_args(4, 32), source=EXTREME)]


FP8_ARGS: Final[dict[str, Any]] = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False}


def cases_of(name: str) -> dict[str, list[Case]]:
    """Format -> cases, for weights of one dtype; other dtypes than bfloat16 get what depends on the dtype."""
    both = (PLAIN, EXTREME)
    groups = {
        "mxfp4-pack-quantized": [preset("MXFP4A16", s) for s in both],
        "mxfp6-pack-quantized": [preset("MXFP6A16", s) for s in both],
        "mxfp8-quantized": [preset("MXFP8A16", s) for s in both],
        "int-quantized": [preset("INT8", s) for s in both],
        "float-quantized": [preset("FP8_DYNAMIC", s) for s in both],
        "nvfp4-pack-quantized": [preset("NVFP4A16", s) for s in both]
        + [preset("NVFP4A16", module=f"given-{g:g}", global_scale=g) for g in (1.0, 512.0)],
    }
    if name != "BF16":
        return {
            **groups,
            "pack-quantized": [Case("W4-G32", int_args(4, 32)), Case("W4-G32-ASYM", int_args(4, 32, False))],
        }
    tensor = Case("FPW8A16", {**FP8_ARGS, "strategy": "tensor"})
    block = Case("block-A16", {**FP8_ARGS, "strategy": "block", "block_structure": [128, 128]})
    groups["float-quantized"] += [tensor, preset("FP8_BLOCK"), preset("FP8_BLOCK", RAGGED), block]
    groups["nvfp4-pack-quantized"] += [preset("NVFP4A16", module=m) for m in FUSED]
    return {**groups, "pack-quantized": pack_cases()}


def ranges(weight: torch.Tensor, args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Smallest and largest weight for each scale, in the shape that the library stores scales in."""
    rows, columns = weight.shape
    if args.strategy == "tensor":
        return weight.min().reshape(1), weight.max().reshape(1)
    if args.strategy == "channel":
        return weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    if args.strategy == "block":
        height, width = args.block_structure
        padded = helpers.maybe_pad_tensor_for_block_quant(weight, (height, width))
        blocks = padded.unflatten(1, (-1, width)).unflatten(0, (-1, height))
        return blocks.amin((1, 3)), blocks.amax((1, 3))
    grouped = weight.reshape(rows, columns // args.group_size, args.group_size)
    return grouped.amin(2), grouped.amax(2)


def quantize(weight: torch.Tensor, scheme: Any, fmt: str, global_scale: torch.Tensor | None) -> Tensors:
    """What the library stores for `weight`: scales rounded to the weight's dtype, the rest in float32."""
    args, dtype = scheme.weights, weight.dtype
    low, high = ranges(weight.float(), args)
    scale, zero = helpers.calculate_qparams(low, high, args, global_scale)
    if args.scale_dtype is None:
        scale = scale.to(dtype).float()
        empty = (low == high) & (low == 0) | (scale == 0)
        scale[empty] = torch.finfo(dtype).eps  # what calculate_qparams gives in that dtype
    state = {"weight": weight.float(), "weight_scale": scale, "weight_zero_point": zero}
    if global_scale is not None:
        state["weight_global_scale"] = global_scale
    compressor = compressors.BaseCompressor.get_value_from_registry(fmt)
    out: Tensors = compressor.compress(state, scheme)
    if args.scale_dtype is None:
        out["weight_scale"] = out["weight_scale"].to(dtype)
    assert sorted(out) == sorted(compressor.compression_param_names(scheme)), (sorted(out), fmt)
    return out


def quantize_natively(weight: torch.Tensor, scheme: Any, fmt: str, global_scale: torch.Tensor | None) -> Tensors:
    """The same in the arithmetic of the weight's dtype, as the library and llm-compressor do it."""
    low, high = ranges(weight, scheme.weights)
    if global_scale is not None:
        global_scale = global_scale.to(weight.dtype).float()
    scale, zero = helpers.calculate_qparams(low, high, scheme.weights, global_scale)
    state = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero}
    if global_scale is not None:
        state["weight_global_scale"] = global_scale
    out: Tensors = compressors.BaseCompressor.get_value_from_registry(fmt).compress(state, scheme)
    return out


def count_differences(ours: Tensors, native: Tensors) -> dict[str, str]:
    """Tensor -> "different bytes or elements of all", where the two arithmetics differ."""

    def raw(t: torch.Tensor) -> torch.Tensor:
        return t.contiguous().view(torch.uint8) if t.is_floating_point() or t.dtype == torch.uint8 else t

    found = {}
    for name, t in ours.items():
        a, b = raw(t), raw(native[name].to(t.dtype) if name.endswith("global_scale") else native[name])
        if a.shape != b.shape or not torch.equal(a, b):
            found[name] = f"{int((a != b).sum()) if a.shape == b.shape else 'all'} of {a.numel()}"
    return found


def global_scale_of(case: Case, weights: Tensors) -> torch.Tensor | None:
    """The one given, or that of the tensor, or of all partners in a fused layer."""
    if case.weights["strategy"] != "tensor_group":
        return None
    if case.global_scale is not None:
        return torch.tensor([case.global_scale])
    rows = torch.cat([weights[PLAIN][r] for r in FUSED.values()]) if case.name in FUSED else weights[case.source]
    scale: torch.Tensor = helpers.generate_gparam(rows.float().min(), rows.float().max())
    return scale


def config_of(groups: dict[str, Any], ignore: Iterable[str], fmt: str) -> dict[str, Any]:
    """The quantization_config that the library itself would write, read back and accepted by it."""
    config = quantization.QuantizationConfig(
        config_groups=groups, format=fmt, quantization_status="compressed", ignore=list(ignore)
    )
    written = {
        "version": ct.__version__,
        "quant_method": "compressed-tensors",
        **config.model_dump(exclude=["quant_method"]),
    }
    text = json.dumps(written, default=str)
    read = quantization.QuantizationConfig.model_validate(json.loads(text))
    assert read.model_dump() == config.model_dump()
    result: dict[str, Any] = json.loads(text)
    return result


def scheme_of(case: Case, fmt: str, targets: list[str]) -> Any:
    args = quantization.QuantizationArgs
    inputs = case.inputs and args(**case.inputs)
    return quantization.QuantizationScheme(
        targets=targets, weights=args(**case.weights), input_activations=inputs, format=fmt
    )


def write_file(fmt: str, name: str, cases: list[Case], weights: Tensors) -> dict[str, Any]:
    """Write one golden file; returns its entry of cases.json."""
    tensors: Tensors = {}
    entry: dict[str, Any] = {}
    for case in cases:
        weight, scheme = weights[case.source], scheme_of(case, fmt, ["Linear"])
        weight = weight[FUSED[case.name]] if case.name in FUSED else weight
        given = global_scale_of(case, weights)
        out = quantize(weight, scheme, fmt, given)
        native = count_differences(out, quantize_natively(weight, scheme, fmt, given))
        tensors |= {f"{case.name}.{k}": v.contiguous() for k, v in out.items()}
        inferred = importlib.import_module("compressed_tensors.compressors.format").infer_module_format
        entry[case.name] = {
            "input": case.source,
            "rows": [FUSED[case.name].start, FUSED[case.name].stop] if case.name in FUSED else None,
            "quantization_config": config_of({"group_0": scheme}, ["lm_head"], fmt),
            "format_inferred_by_the_library": inferred(torch.nn.Linear, scheme).value,
            "differs_in_the_weights_own_dtype": native,
        }
    folder = HERE / fmt
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / f"{name}.safetensors", metadata={"format": "pt"})
    return entry


def part_of(case: Case) -> str:
    """The end of the file's name."""
    if case.source == RAGGED:
        return "-ragged"
    if case.weights["symmetric"]:
        return ""
    return "-asym567" if case.weights["num_bits"] in (5, 6, 7) else "-asym"


def write_presets() -> None:
    """What the library's names stand for, and the format that it would choose."""
    infer: Any = importlib.import_module("compressed_tensors.compressors.format").infer_module_format
    presets: Any = importlib.import_module("compressed_tensors.quantization.quant_scheme").PRESET_SCHEMES
    found = {}
    for name in presets:
        scheme = quantization.preset_name_to_scheme(name, ["Linear"])
        if scheme.weights:
            dumped = scheme.model_dump(exclude_none=True, include={"weights", "input_activations"})
            found[name] = {**dumped, "format": infer(torch.nn.Linear, scheme).value}
    (HERE / "presets.json").write_text(json.dumps(found, indent=1, default=str) + "\n")


def mixed_config() -> dict[str, Any]:
    """Two groups with their own formats, and an ignore list of names and of expressions."""
    packed, floats = Case("", int_args(4, 128)), preset("FP8_DYNAMIC")
    attention = ["re:.*self_attn\\.(q|k|v|o)_proj$"]
    groups = {
        "group_0": scheme_of(floats, "float-quantized", attention),
        "group_1": scheme_of(packed, "pack-quantized", ["re:.*mlp\\.(gate|up|down)_proj$"]),
    }
    return config_of(groups, ["lm_head", "model.layers.0.mlp.gate", "re:.*mlp\\.gate$"], "mixed-precision")


def main() -> None:
    """Make every file."""
    entries: dict[str, Any] = {"mixed-precision": mixed_config()}
    for name, dtype in DTYPES.items():
        weights = load_file(HERE / "inputs" / f"{name}.safetensors")
        assert all(w.dtype == dtype for w in weights.values())
        for fmt, cases in cases_of(name).items():
            parts: dict[str, list[Case]] = {"": [], "-asym": [], "-asym567": [], "-ragged": []}
            for case in cases:
                parts[part_of(case)].append(case)
            for part, some in parts.items():
                if some:
                    entries[f"{fmt}/{name}{part}"] = write_file(fmt, name + part, some, weights)
    (HERE / "cases.json").write_text(json.dumps(entries, indent=1) + "\n")
    write_presets()


if __name__ == "__main__":
    main()
