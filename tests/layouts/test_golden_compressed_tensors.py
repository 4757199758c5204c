"""Quantized and packed bytes against compressed-tensors' own; golden/compressed_tensors/PROVENANCE.md says how made."""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors import safe_open

from shardq.arena import Arena, reserve
from shardq.figures import FIGURES
from shardq.kernels import KernelSet
from shardq.layouts import find_layout
from shardq.layouts.base import ModuleChoice
from shardq.making import TARGET_ARRAYS, WEIGHT_ARRAYS
from shardq.quantizers.buffers import buffer_shapes, take_buffers
from shardq.quantizers.quantized import Quantized
from shardq.quantizers.rtn import quantize_rows
from shardq.schemes import WHOLE_ROW, Scheme, parse_scheme

Pack = Callable[..., dict[str, NDArray[Any]]]
GOLDEN: Final = Path(__file__).with_name("golden") / "compressed_tensors"
CASES: Final[Mapping[str, Any]] = json.loads((GOLDEN / "cases.json").read_text())
FLOATS: Final = {4: "e2m1", 6: "e2m3", 8: "e4m3fn"}
OFFERED: Final = [(file, module) for file, modules in CASES.items() if "/" in file for module in modules]
REACHES: Final = {"tensor": "tensor", "tensor_group": "fused"}  # by the library's strategy
LARGEST: Final = np.float32(448 * 6)  # over the largest magnitude it is a global scale


def group_of(file: str, module: str) -> dict[str, Any]:
    group: dict[str, Any] = CASES[file][module]["quantization_config"]["config_groups"]["group_0"]
    return group


def scheme_of(group: Mapping[str, Any]) -> Scheme:
    """What the library's arguments mean."""
    weights = group["weights"]
    element = f"int{weights['num_bits']}" if weights["type"] == "int" else FLOATS[weights["num_bits"]]
    scale = {"torch.uint8": "e8m0", "torch.float8_e4m3fn": "e4m3fn"}.get(weights.get("scale_dtype"), "weight")
    rows, columns = weights.get("block_structure") or (1, weights.get("group_size") or WHOLE_ROW)
    scheme = Scheme(
        element,
        columns,
        weights["symmetric"],
        scale=scale,
        group_rows=rows,
        reach=REACHES.get(weights["strategy"], "group"),
        activation="int8" if group["format"] == "int-quantized" else "",
    )
    return find_layout("compressed-tensors").settle(scheme)


def read(path: Path) -> dict[str, tuple[str, NDArray[Any]]]:
    """Tensors as (type, array); patterns where numpy has no such type."""
    found: dict[str, tuple[str, NDArray[Any]]] = {}
    with path.open("rb") as f:
        header = json.loads(f.read(int.from_bytes(f.read(8), "little")))
        data = f.read()
    for name, t in header.items():
        if name != "__metadata__":
            begin, end = t["data_offsets"]
            array = np.frombuffer(data[begin:end], TARGET_ARRAYS[t["dtype"]]).reshape(t["shape"])
            found[name] = (t["dtype"], array)
    return found


def weight_of(file: str, module: str) -> tuple[str, NDArray[Any]]:
    dtype = file.split("/")[1].split("-")[0]
    case = CASES[file][module]
    _, array = read(GOLDEN / "inputs" / f"{dtype}.safetensors")[case["input"]]
    rows = case["rows"]
    return dtype, array.view(WEIGHT_ARRAYS[dtype]) if rows is None else array[slice(*rows)].view(WEIGHT_ARRAYS[dtype])


def amax_of(file: str, module: str, scheme: Scheme, kernels: KernelSet) -> float | None:
    """The largest magnitude of all that the case's scheme reaches: the modules with `rows` are one matrix to a server;
    `given-X` stands for the magnitude whose global scale is X."""
    if scheme.reach == "group":
        return None
    if module.startswith("given-"):
        return float(LARGEST / np.float32(module.removeprefix("given-")))
    partners = [m for m, case in CASES[file].items() if case["rows"]] if CASES[file][module]["rows"] else [module]
    found = []
    for dtype, weight in (weight_of(file, m) for m in partners):
        out = np.empty((len(weight), 1), np.float32)
        assert kernels.group_absmax(np.ascontiguousarray(weight), dtype, weight.shape[1], out) == 0
        found.append(out.max())
    return float(max(found))


def quantize(
    dtype: str, weight: NDArray[Any], scheme: Scheme, kernels: KernelSet, amax: float | None = None
) -> Quantized:
    rows, columns = weight.shape
    arena = Arena()
    arena.reset(reserve(*buffer_shapes(rows, columns, scheme)))
    buffers = take_buffers(arena, rows, columns, scheme)
    q, bad = quantize_rows(
        np.ascontiguousarray(weight), dtype, scheme, buffers, np.empty((rows, FIGURES)), kernels, amax
    )
    assert bad == 0
    zeros = None if q.zeros is None else q.zeros.copy()
    return Quantized(q.codes.copy(), q.scales.copy(), zeros, global_scale=q.global_scale)


@pytest.mark.parametrize(("file", "module"), OFFERED)
def test_bytes_equal_the_library(file: str, module: str, kernels: KernelSet, pack_whole: Pack) -> None:
    group = group_of(file, module)
    scheme = scheme_of(group)
    dtype, weight = weight_of(file, module)
    layout = find_layout("compressed-tensors")
    q = quantize(dtype, weight, scheme, kernels, amax_of(file, module, scheme, kernels))
    theirs = {
        name.removeprefix(f"{module}."): t
        for name, t in read(GOLDEN / f"{file}.safetensors").items()
        if name.startswith(f"{module}.")
    }
    ours = pack_whole(layout, scheme, q, dtype=dtype)
    assert ours.keys() == theirs.keys()
    specs = {s.suffix: s for s in layout.outputs(scheme, dtype, *weight.shape)}
    for name, (kind, array) in theirs.items():
        assert specs[name].dtype == kind, name
        assert ours[name].shape == array.shape, name
        assert np.array_equal(ours[name], array), name
    back = layout.unpack({name: array for name, (_, array) in theirs.items()}, scheme, kernels)
    assert np.array_equal(back.codes, q.codes)
    assert np.array_equal(back.scales, q.scales)
    assert back.global_scale == q.global_scale
    assert (back.zeros is None) == (q.zeros is None)
    assert back.zeros is None or np.array_equal(back.zeros, q.zeros)


def test_golden_files_hold_what_the_cases_name() -> None:
    assert len(OFFERED) > 60
    for file, module in OFFERED:
        with safe_open(GOLDEN / f"{file}.safetensors", "np") as f:
            assert any(name.startswith(f"{module}.") for name in f.keys())  # noqa: SIM118


PRESETS_OF_THE_LIBRARY: Final[Mapping[str, Any]] = json.loads((GOLDEN / "presets.json").read_text())
NEED_DATA: Final = ("FP8", "NVFP4")  # a scale of activations in each module
OURS: Final[Mapping[str, str]] = {"FP8": "FP8_STATIC_TENSOR"}  # by the library's name, where it is not ours


@pytest.mark.parametrize("name", PRESETS_OF_THE_LIBRARY)
def test_names_mean_what_the_library_means(name: str) -> None:
    layout, theirs = find_layout("compressed-tensors"), PRESETS_OF_THE_LIBRARY[name]
    scheme = layout.settle(parse_scheme(OURS.get(name, name)).scheme)
    assert layout.refuse(scheme, scheme, 128, 128) is None
    choice = ModuleChoice("model.layers.0.mlp.up_proj", "linear", scheme)
    ours = layout.config_block(scheme, [choice], "0.0")["config_groups"]["group_0"]
    for key in ("weights", "input_activations"):
        args = {k: v for k, v in (theirs.get(key) or {}).items() if k not in ("zp_dtype", "observer")}
        assert (ours[key] or {}) == args, key
    packed_anyway = scheme.format.is_integer and scheme.bits < 8 and scheme.activation  # what vLLM reads
    assert ours["format"] == ("pack-quantized" if packed_anyway else theirs["format"])


@pytest.mark.parametrize("name", PRESETS_OF_THE_LIBRARY)
def test_names_that_need_data_are_those_with_parameters_of_activations(name: str) -> None:
    inputs = PRESETS_OF_THE_LIBRARY[name].get("input_activations", {})
    assert (inputs.get("dynamic", True) is not True) == (name in NEED_DATA)
    assert parse_scheme(OURS.get(name, name)).scheme.calibrated == (name in NEED_DATA)


# Tensors beside the weight's in checkpoints of auto-round 0.16.1, formats auto_round and llm_compressor (the same in
# llm-compressor 0.14), of a model in bf16: type and shape.
OF_INPUTS: Final = {
    "FP8_STATIC": ("input_scale", "BF16", (1,)),
    "FP8_STATIC_TENSOR": ("input_scale", "BF16", (1,)),
    "W8A8_STATIC": ("input_scale", "BF16", (1,)),
    "NVFP4": ("input_global_scale", "F32", (1,)),
}


@pytest.mark.parametrize("name", OF_INPUTS)
def test_scales_of_activations_are_one_tensor_more(name: str) -> None:
    layout = find_layout("compressed-tensors")
    scheme = layout.settle(parse_scheme(name).scheme)
    beside = {s.suffix for s in layout.outputs(layout.settle(replace(scheme, activation="")), "BF16", 64, 32)}
    found = [s for s in layout.outputs(scheme, "BF16", 64, 32) if s.suffix.startswith("input")]
    assert [(s.suffix, s.dtype, s.shape) for s in found] == [OF_INPUTS[name]]
    if name != "W8A8_STATIC":  # weights alone are packed
        assert {s.suffix for s in layout.outputs(scheme, "BF16", 64, 32)} - beside == {OF_INPUTS[name][0]}
