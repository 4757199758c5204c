"""MX, MXINT4 and NVFP4_E5M3 against auto-round's own bytes; golden/auto_round/PROVENANCE.md says how they were made."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
from numpy.typing import NDArray

from shardq.arena import Arena, reserve
from shardq.figures import FIGURES
from shardq.files.safetensors import read_header
from shardq.kernels import KernelSet
from shardq.layouts import find_layout
from shardq.making import TARGET_ARRAYS, WEIGHT_ARRAYS
from shardq.quantizers.buffers import buffer_shapes, take_buffers
from shardq.quantizers.quantized import Quantized
from shardq.quantizers.rtn import quantize_rows
from shardq.schemes import Scheme, parse_scheme

Pack = Callable[..., dict[str, NDArray[Any]]]
GOLDEN: Final = Path(__file__).with_name("golden")
FLOATS: Final = GOLDEN / "auto_round" / "floats"
INPUTS: Final = GOLDEN / "compressed_tensors" / "inputs"
SCHEMES: Final = ("MXFP4", "MXFP8", "MXINT4", "NVFP4_E5M3")
CASES: Final = [
    (dtype, scheme, weight)
    for dtype in ("BF16", "F16", "F32")
    for scheme in SCHEMES
    for weight in (("plain", "extreme", "below") if dtype == "F32" else ("plain", "extreme"))
]
LAYOUT: Final = find_layout("auto_round")


def read(path: Path) -> dict[str, tuple[str, NDArray[Any]]]:
    """Tensors as (type, array); patterns where numpy has no such type."""
    raw = path.read_bytes()
    return {
        t.name: (t.dtype, np.frombuffer(raw[t.begin : t.end], TARGET_ARRAYS[t.dtype]).reshape(t.shape))
        for t in read_header(path).tensors
    }


def weight_of(dtype: str, name: str) -> NDArray[Any]:
    found = read(FLOATS / "F32.safetensors") if name == "below" else read(INPUTS / f"{dtype}.safetensors")
    array = found["below.weight" if name == "below" else name][1]
    return np.ascontiguousarray(array.view(WEIGHT_ARRAYS[dtype]))


def quantize(dtype: str, weight: NDArray[Any], scheme: Scheme, kernels: KernelSet) -> Quantized:
    rows, columns = weight.shape
    arena = Arena()
    arena.reset(reserve(*buffer_shapes(rows, columns, scheme)))
    q, bad = quantize_rows(
        weight, dtype, scheme, take_buffers(arena, rows, columns, scheme), np.empty((rows, FIGURES)), kernels
    )
    assert bad == 0
    return Quantized(q.codes.copy(), q.scales.copy(), None)


def theirs(dtype: str, name: str, weight: str) -> dict[str, tuple[str, NDArray[Any]]]:
    module = f"{name}-{weight}."
    tensors = read(FLOATS / f"{dtype}.safetensors").items()
    return {k.removeprefix(module): v for k, v in tensors if k.startswith(module)}


@pytest.mark.parametrize(("dtype", "name", "weight"), CASES)
def test_bytes_equal_auto_round(dtype: str, name: str, weight: str, kernels: KernelSet, pack_whole: Pack) -> None:
    scheme, source = LAYOUT.settle(parse_scheme(name).scheme), weight_of(dtype, weight)
    assert LAYOUT.refuse(scheme, scheme, *source.shape) is None
    q = quantize(dtype, source, scheme, kernels)
    ours, expected = pack_whole(LAYOUT, scheme, q, dtype=dtype), theirs(dtype, name, weight)
    cut = pack_whole(LAYOUT, scheme, q, dtype=dtype, tile=4, slab=8)
    assert {k: v.tobytes() for k, v in cut.items()} == {k: v.tobytes() for k, v in ours.items()}
    specs = {s.suffix: s for s in LAYOUT.outputs(scheme, dtype, *source.shape)}
    assert ours.keys() == expected.keys() == specs.keys()
    for suffix, (kind, array) in expected.items():
        assert (specs[suffix].dtype, specs[suffix].shape) == (kind, array.shape), suffix
    scales = expected["weight_scale"][1]
    assert np.array_equal(ours["weight_scale"], scales)
    codes = next(k for k in ours if k != "weight_scale")
    same = ours[codes] == expected[codes][1]
    if scheme.scale == "e5m3":  # auto-round divides by a scale of 0, which gives such a group any codes; ours are 0
        empty = np.repeat(scales == 0, scheme.group_size * scheme.bits // 8, axis=1)
        assert not ours[codes][empty].any()
        same |= empty
    assert same.all()
    back = LAYOUT.unpack({k: a for k, (_, a) in expected.items()}, scheme, kernels)
    full = back.scales != 0
    assert np.array_equal(back.scales, q.scales)
    assert np.array_equal(back.codes[full.repeat(scheme.group_size, 1)], q.codes[full.repeat(scheme.group_size, 1)])


def test_float32_magnitudes_below_powers_of_two_get_auto_rounds_exponents(kernels: KernelSet) -> None:
    """Golden bytes that the exponent of the magnitude alone would not give."""
    most = np.empty((16, 8), np.float32)
    kernels.group_absmax(weight_of("F32", "below"), "F32", 32, most)
    plain = (most.view(np.uint32) >> 23).astype(np.int64) - 2
    _, stored = theirs("F32", "MXFP4", "below")["weight_scale"]
    assert set((stored - plain).flat) == {0, 1}
