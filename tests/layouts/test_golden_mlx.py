"""Quantized and packed bytes against those of mlx and mlx-lm; golden/mlx/PROVENANCE.md says how made."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
from numpy.typing import NDArray

from shardq.arena import Arena, reserve
from shardq.decide import decide
from shardq.figures import FIGURES
from shardq.headers import read_checkpoint
from shardq.kernels import KernelSet
from shardq.layouts import find_layout
from shardq.layouts.base import ModuleChoice
from shardq.making import TARGET_ARRAYS, WEIGHT_ARRAYS
from shardq.quantizers.buffers import buffer_shapes, take_buffers
from shardq.quantizers.quantized import Quantized
from shardq.quantizers.rtn import quantize_rows
from shardq.recipe import Recipe, make_recipe
from shardq.schemes import Scheme
from shardq.sources import open_source

Pack = Callable[..., dict[str, NDArray[Any]]]
Tensors = dict[str, tuple[str, NDArray[Any]]]
MLX: Final = find_layout("mlx")
GOLDEN: Final = Path(__file__).with_name("golden") / "mlx"
INPUTS: Final = GOLDEN.parent / "compressed_tensors" / "inputs"
DTYPES: Final = ("BF16", "F16", "F32")
OVERFLOWING: Final = "b4-g64-extreme"  # the range of its first row is beyond fp32; the library writes infinite scales
FLOATS: Final = {
    "mxfp4": Scheme("e2m1", 32, symmetric=True, scale="e8m0", exponent="even", activation="mxfp4"),
    "mxfp8": Scheme("e4m3fn", 32, symmetric=True, scale="e8m0", exponent="even", activation="mxfp8"),
    "nvfp4": Scheme("e2m1", 16, symmetric=True, scale="e4m3fn", reach="fused"),
}


def read(path: Path) -> Tensors:
    """Tensors as (type, array); patterns where numpy has no such type."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    found: Tensors = {}
    for name, t in json.loads(data[8:start]).items():
        if name != "__metadata__":
            begin, end = (start + x for x in t["data_offsets"])
            found[name] = (t["dtype"], np.frombuffer(data[begin:end], TARGET_ARRAYS[t["dtype"]]).reshape(t["shape"]))
    return found


def quantize(dtype: str, weight: NDArray[Any], scheme: Scheme, kernels: KernelSet) -> Quantized:
    arena = Arena()
    arena.reset(reserve(*buffer_shapes(*weight.shape, scheme)))
    buffers = take_buffers(arena, *weight.shape, scheme)
    weight = np.ascontiguousarray(weight.view(WEIGHT_ARRAYS[dtype]))
    q, bad = quantize_rows(weight, dtype, scheme, buffers, np.empty((len(weight), FIGURES)), kernels)
    assert bad == 0, f"{bad} bad groups"
    biases = None if q.biases is None else q.biases.copy()
    return Quantized(q.codes.copy(), q.scales.copy(), None, biases)


def widened(stored: NDArray[Any]) -> NDArray[Any]:
    return (stored.astype(np.uint32) << 16).view(np.float32) if stored.dtype == np.uint16 else stored


def cases() -> Iterator[tuple[str, str, str, Scheme]]:
    """Folder, dtype, module, scheme."""
    for dtype in DTYPES:
        for module in {n.rpartition(".")[0] for n in read(GOLDEN / "affine" / f"{dtype}.safetensors")}:
            bits, group = (int(x[1:]) for x in module.split("-")[:2])
            yield "affine", dtype, module, Scheme(f"int{bits}", group, symmetric=bits != 5)
        for mode, scheme in FLOATS.items():
            for module in {n.rpartition(".")[0] for n in read(GOLDEN / mode / f"{dtype}.safetensors")}:
                yield mode, dtype, module, scheme


def input_of(dtype: str, module: str) -> NDArray[Any]:
    inputs = read(INPUTS / f"{dtype}.safetensors")
    if "extreme" not in module:
        return inputs["plain"][1]
    rows = module.split("-")[1:] if module.startswith("extreme") else ()
    return inputs["extreme"][1][slice(*map(int, rows))] if rows else inputs["extreme"][1]


@pytest.mark.parametrize(("folder", "dtype", "module", "asked"), sorted(cases(), key=str))
def test_bytes_equal_the_library(
    folder: str, dtype: str, module: str, asked: Scheme, kernels: KernelSet, pack_whole: Pack
) -> None:
    scheme = MLX.settle(asked)
    weight = input_of(dtype, module)
    found = read(GOLDEN / folder / f"{dtype}.safetensors")
    theirs = {n.rpartition(".")[2]: t for n, t in found.items() if n.startswith(f"{module}.")}
    if module == OVERFLOWING and dtype != "F16":
        wrong = ~np.isfinite(widened(theirs["scales"][1]))
        assert wrong[0].all()
        assert not wrong[1:].any()
        with pytest.raises(AssertionError, match=f"{wrong.sum()} bad groups"):
            quantize(dtype, weight, scheme, kernels)
        weight, theirs = weight[1:], {n: (kind, a[1:]) for n, (kind, a) in theirs.items()}
    q = quantize(dtype, weight, scheme, kernels)
    ours = pack_whole(MLX, scheme, q, dtype=dtype, tile=7, slab=21)
    assert ours.keys() == theirs.keys()
    specs = {s.suffix: s for s in MLX.outputs(scheme, dtype, *weight.shape)}
    for name, (kind, array) in theirs.items():
        assert specs[name].dtype == kind
        assert ours[name].shape == array.shape
        assert np.array_equal(ours[name], array), f"{name}: {(ours[name] != array).sum()} of {array.size}"


# --- whole models, against mlx_lm.convert --------------------------------------------------------------------------

ROUTERS: Final = {"include": ["**.mlp.gate"], "layer_config": {"**.mlp.gate": {"scheme": "W8A16G64"}}}  # as mlx-lm has
SIX_BITS: Final = Scheme("int6", 32, symmetric=False)
MODELS: Final[dict[str, tuple[str, Recipe]]] = {
    "llama-affine4": ("llama", make_recipe("W4A16G32@mlx")),
    "llama-override": ("llama", make_recipe("W4A16G32@mlx", ignore=["**.o_proj"])),
    "llama-mxfp8": ("llama", make_recipe("MXFP8@mlx")),
    "qwen3_moe-affine4": ("qwen3_moe", make_recipe("W4A16G32@mlx", **ROUTERS)),
    "qwen3_moe-nvfp4": ("qwen3_moe", replace(make_recipe("MXFP4@mlx", **ROUTERS), scheme=MLX.settle(FLOATS["nvfp4"]))),
    "qwen3_moe-mxfp4": ("qwen3_moe", make_recipe("MXFP4@mlx", **ROUTERS)),
}


def convert(
    folder: Path, recipe: Recipe, exception: str, kernels: KernelSet, pack: Pack
) -> tuple[dict[str, Any], Tensors]:
    """The configuration block, and what the layout makes of each tensor, experts stacked. Modules whose name ends with
    `exception` get SIX_BITS."""
    checkpoint, source = read_checkpoint(open_source(str(folder))), read(folder / "model.safetensors")
    decisions = decide(checkpoint, recipe)
    choices = [
        ModuleChoice(
            d.tensor.module,
            d.role.value,
            MLX.settle(SIX_BITS) if exception and d.tensor.module.endswith(exception) else d.scheme,
        )
        for d in decisions
        if d.tensor.name.endswith(".weight") and d.role.value != "norm"
    ]
    quantized = {c.module: c.scheme for c in choices if c.scheme}
    places = MLX.places(list(quantized), checkpoint.config)
    out: Tensors = {n: t for n, t in source.items() if n.removesuffix(".weight") not in quantized}
    stacks: dict[str, tuple[str, list[NDArray[Any]]]] = {}
    for module, scheme in quantized.items():
        dtype, weight = source[f"{module}.weight"]
        arrays = pack(MLX, scheme, quantize(dtype, weight, scheme, kernels), dtype=dtype)
        for spec in MLX.outputs(scheme, dtype, *weight.shape):
            array = arrays[spec.suffix]
            if module not in places:
                out[f"{module}.{spec.suffix}"] = (spec.dtype, array)
                continue
            place = places[module]
            _, stack = stacks.setdefault(f"{place.module}.{spec.suffix}", (spec.dtype, [array] * place.count))
            stack[place.index] = array
    out |= {name: (kind, np.stack(stack)) for name, (kind, stack) in stacks.items()}
    return MLX.config_block(recipe.scheme, choices, "0.0"), out


@pytest.mark.parametrize("name", MODELS)
def test_models_equal_those_of_mlx_lm(name: str, kernels: KernelSet, pack_whole: Pack) -> None:
    family, recipe = MODELS[name]
    exception = "v_proj" if name == "llama-override" else ""
    block, ours = convert(GOLDEN / "models" / f"{family}-source", recipe, exception, kernels, pack_whole)
    folder = GOLDEN / "models" / name
    theirs = read(folder / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for tensor, (kind, array) in theirs.items():
        assert ours[tensor][0] == kind, tensor
        assert np.array_equal(ours[tensor][1], array), tensor
    config = json.loads((folder / "config.json").read_text())
    paths = {t.rpartition(".")[0] for t in theirs}
    said = {k: v for k, v in block.items() if (k in paths or not isinstance(v, dict)) and v is not False}
    assert filled(said) == filled(config["quantization"])
    assert MLX.config_keys(block) == {"quantization": block, "quantization_config": block}
    assert config["quantization_config"] == config["quantization"]


def filled(block: dict[str, Any]) -> dict[str, Any]:
    """With the mode that a module has to which the library's configuration gives none."""
    return {k: {"mode": "affine", **v} if isinstance(v, dict) else v for k, v in block.items()}
