"""AWQ and native FP8 against what GPTQModel, compressed-tensors and transformers make of the same weights; the golden
folders' PROVENANCE.md say how."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
from numpy.typing import NDArray

from shardq.arena import Arena, reserve
from shardq.figures import FIGURES
from shardq.kernels import KernelSet
from shardq.layouts import find_layout
from shardq.layouts.base import ModuleChoice
from shardq.making import TARGET_ARRAYS
from shardq.quantizers.buffers import buffer_shapes, take_buffers
from shardq.quantizers.decode import decode_rows
from shardq.quantizers.quantized import Quantized
from shardq.quantizers.rtn import quantize_rows
from shardq.schemes import PRESETS, Scheme

Pack = Callable[..., dict[str, NDArray[Any]]]
Tensors = dict[str, NDArray[Any]]
GOLDEN: Final = Path(__file__).with_name("golden")
AWQ_CASES: Final = list(json.loads((GOLDEN / "awq" / "cases.json").read_text()))
AWQ: Final = find_layout("awq")
FP8: Final = find_layout("fp8")
BLOCK: Final = FP8.settle(PRESETS["FP8_BLOCK"].scheme)
MXFP8: Final = FP8.settle(PRESETS["MXFP8"].scheme)
CUTS: Final = [(1 << 20, 1 << 20), (32, 1 << 20), (32, 64), (1 << 20, 32)]  # tile rows, slab rows
FP8_FILES: Final = [("block/whole", BLOCK), ("block/ragged", BLOCK), ("mx/whole", MXFP8)]


def read(path: Path, module: str) -> Tensors:
    """Tensors of one module; patterns where numpy has no such type."""
    with path.open("rb") as f:
        header = json.loads(f.read(int.from_bytes(f.read(8), "little")))
        data = f.read()
    found: Tensors = {}
    for name, t in header.items():
        if name.startswith(module):
            begin, end = t["data_offsets"]
            array = np.frombuffer(data[begin:end], TARGET_ARRAYS[t["dtype"]]).reshape(t["shape"])
            found[name.removeprefix(module).removeprefix(".")] = array
    return found


def plain() -> NDArray[np.uint16]:
    found = read(GOLDEN / "compressed_tensors" / "inputs" / "BF16.safetensors", "plain")[""]
    return found.view(np.uint16)


def quantize(weight: NDArray[Any], scheme: Scheme, kernels: KernelSet) -> Quantized:
    rows, columns = weight.shape
    arena = Arena()
    arena.reset(reserve(*buffer_shapes(rows, columns, scheme)))
    buffers = take_buffers(arena, rows, columns, scheme)
    q, bad = quantize_rows(np.ascontiguousarray(weight), "BF16", scheme, buffers, np.empty((rows, FIGURES)), kernels)
    assert bad == 0
    return Quantized(q.codes.copy(), q.scales.copy(), None if q.zeros is None else q.zeros.copy())


def same_bytes(ours: Tensors, theirs: Tensors) -> bool:
    return all((ours[k].shape, ours[k].tobytes()) == (theirs[k].shape, theirs[k].tobytes()) for k in ours)


# --- awq -----------------------------------------------------------------------------------------------------------


def awq_scheme(case: str) -> Scheme:
    return AWQ.settle(Scheme("int4", int(case.rpartition("-G")[2]), symmetric=case.startswith("sym")))


@pytest.mark.parametrize("case", AWQ_CASES)
def test_auto_rounds_packing_of_that_name_has_the_same_words(case: str, kernels: KernelSet, pack_whole: Pack) -> None:
    theirs, scheme = read(GOLDEN / "awq" / "gemm" / "BF16.safetensors", case), awq_scheme(case)
    q = Quantized(*(np.ascontiguousarray(theirs[k]) for k in ("codes", "scales_given", "zeros")))
    layout = find_layout("auto_round:auto_awq")
    assert same_bytes(pack_whole(layout, scheme, q), theirs)
    block = layout.config_block(scheme, [ModuleChoice("model.layers.0.mlp.up_proj", "linear", scheme)], "0.0")
    assert (block["packing_format"], block["sym"]) == ("auto_round:auto_awq", scheme.symmetric)


@pytest.mark.parametrize(("tile", "slab"), CUTS)
@pytest.mark.parametrize("case", AWQ_CASES)
def test_awq_words_equal_gptqmodel(case: str, tile: int, slab: int, kernels: KernelSet, pack_whole: Pack) -> None:
    theirs, scheme = read(GOLDEN / "awq" / "gemm" / "BF16.safetensors", case), awq_scheme(case)
    q = Quantized(*(np.ascontiguousarray(theirs[k]) for k in ("codes", "scales_given", "zeros")))
    ours = pack_whole(AWQ, scheme, q, tile=tile, slab=slab)
    assert list(ours) == ["qweight", "qzeros", "scales"]
    assert same_bytes(ours, theirs)
    back = AWQ.unpack({k: theirs[k] for k in ours}, scheme, kernels)
    assert np.array_equal(back.codes, q.codes)
    assert np.array_equal(back.zeros, q.zeros)
    assert np.array_equal(back.scales, q.scales.astype(np.float16).astype(np.float32))


@pytest.mark.parametrize("case", [c for c in AWQ_CASES if not c.startswith("random")])
def test_awq_codes_and_scales_equal_auto_round(case: str, kernels: KernelSet, pack_whole: Pack) -> None:
    theirs, scheme = read(GOLDEN / "awq" / "gemm" / "BF16.safetensors", case), awq_scheme(case)
    q = quantize(plain(), scheme, kernels)
    assert q.zeros is not None
    assert np.array_equal(q.codes, theirs["codes"])
    assert np.array_equal(q.zeros, theirs["zeros"])
    assert same_bytes(pack_whole(AWQ, scheme, q), theirs)
    assert (q.zeros == 8).all() == scheme.symmetric


@pytest.mark.parametrize("case", AWQ_CASES)
def test_the_config_of_the_golden_files_is_understood(case: str) -> None:
    config = json.loads((GOLDEN / "awq" / "cases.json").read_text())[case]["quantization_config"]
    # Nobody but shardq says that all zero points are 8.
    believed = replace(awq_scheme(case), symmetric=False)
    assert AWQ.scheme_of(config, "model.layers.0.mlp.up_proj") == believed
    assert AWQ.scheme_of(config, "model.layers.0.mlp.gate") is None
    assert AWQ.scheme_of(config, "lm_head") is None


# --- fp8 -----------------------------------------------------------------------------------------------------------


def fp8_weight(module: str) -> NDArray[np.uint16]:
    folder = GOLDEN / "fp8" / "block" / "input.safetensors"
    if module == "ragged":
        folder = GOLDEN / "compressed_tensors" / "inputs" / "BF16.safetensors"
    return read(folder, module)[""].view(np.uint16)


@pytest.mark.parametrize(("tile", "slab"), [(1 << 20, 1 << 20), (128, 1 << 20), (128, 128)])
@pytest.mark.parametrize(("file", "scheme"), FP8_FILES, ids=[f for f, _ in FP8_FILES])
def test_fp8_bytes_equal_the_libraries(
    file: str, scheme: Scheme, tile: int, slab: int, kernels: KernelSet, pack_whole: Pack
) -> None:
    module = file.partition("/")[2]
    theirs = read(GOLDEN / "fp8" / f"{file}.safetensors", module)
    q = quantize(fp8_weight(module), scheme, kernels)
    ours = pack_whole(FP8, scheme, q, tile=tile, slab=slab)
    assert list(ours) == ["weight", "weight_scale_inv"]
    assert same_bytes(ours, theirs)
    back = FP8.unpack({k: theirs[k] for k in ours}, scheme, kernels)
    assert np.array_equal(back.codes, q.codes)
    assert np.array_equal(back.scales, q.scales)
    assert back.zeros is None


@pytest.mark.parametrize(("file", "scheme"), FP8_FILES, ids=[f for f, _ in FP8_FILES])
def test_fp8_reads_as_its_readers_do(file: str, scheme: Scheme, kernels: KernelSet) -> None:
    theirs = read(GOLDEN / "fp8" / f"{file}.safetensors", file.partition("/")[2])
    wanted = theirs.pop("dequantized_every_8th_row")
    ours = decode_rows(FP8.unpack(theirs, scheme, kernels), scheme, kernels)[::8]
    assert np.array_equal(ours, wanted)  # zeros of either sign are equal


def test_what_transformers_writes_differs_in_last_bits(kernels: KernelSet) -> None:
    """It multiplies by a reciprocal; what it writes reads as well."""
    theirs = read(GOLDEN / "fp8" / "block" / "transformers.safetensors", "transformers")
    q = quantize(fp8_weight("whole"), BLOCK, kernels)
    back = FP8.unpack(theirs, BLOCK, kernels)
    scales = (q.scales[0].view(np.int32) - back.scales[0].view(np.int32)).tolist()
    assert [abs(x) for x in scales] == [1, 1]
    assert (q.codes != back.codes).sum() == 131
    assert (np.abs(q.codes.astype(int) - back.codes.astype(int)) <= 1).all()


def test_mxfp8_scales_stay_normal(kernels: KernelSet) -> None:
    weight = np.zeros((1, 96), np.uint16)
    weight[0, 0], weight[0, 32] = 1, 0x0480  # 2^-133, and 2^-118 = 256 * 2^-126
    q = quantize(weight, MXFP8, kernels)
    assert q.scales.tolist() == [[2.0**-126, 2.0**-126, 1.0]]
