"""What the kernels refuse, natively and in the reference: nothing is cast, copied or broadcast on the quiet."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from shardq.kernels import KernelSet, load, sets


def u8(rows: int, cols: int) -> NDArray[np.uint8]:
    return np.ones((rows, cols), np.uint8)


def u16(rows: int, cols: int) -> NDArray[np.uint16]:
    return np.ones((rows, cols), np.uint16)


def u32(rows: int, cols: int) -> NDArray[np.uint32]:
    return np.ones((rows, cols), np.uint32)


def f32(rows: int, cols: int) -> NDArray[np.float32]:
    return np.ones((rows, cols), np.float32)


def f64(rows: int, cols: int) -> NDArray[np.float64]:
    return np.ones((rows, cols), np.float64)


def both(kernels: KernelSet, bits: int, group: int, stats: NDArray[np.float64]) -> int:
    return kernels.rtn_error_int(u16(1, 4), "F16", bits, group, True, u8(1, 4), f32(1, 2), u8(1, 2), stats)


def error(kernels: KernelSet, bits: int, stats: NDArray[np.float64]) -> None:
    kernels.error_int(f32(1, 4), "F32", bits, u8(1, 4), f32(1, 2), u8(1, 2), 2, stats)


def affine_error(kernels: KernelSet, bits: int, rule: str) -> None:
    kernels.error_affine(u16(1, 4), "F16", bits, u8(1, 4), f32(1, 2), f32(1, 2), 2, rule, f64(1, 6))


def affine(kernels: KernelSet, bits: int, rule: str, offsets: NDArray[np.float32]) -> None:
    kernels.encode_affine(u16(1, 4), "F16", bits, 2, f32(1, 2), offsets, rule, u8(1, 4))


ONE = np.ones(1, np.float32)


def search(
    kernels: KernelSet, *, bits: int = 4, group: int = 2, importance: Any = None, objective: str = "none",
    factors: Any = ONE, signs: str = "range", sweeps: int = 1, scale: str = "fp16", scales: Any = None,
    losses: Any = None,
) -> None:  # fmt: skip
    steps, sums = f32(1, 2) if scales is None else scales, f64(1, 2) if losses is None else losses
    kernels.search_int(
        u16(1, 4), "F16", bits, group, importance, objective, factors, signs, sweeps, scale, 0.0, steps, sums
    )


def lines(kernels: KernelSet, rule: str, offsets: NDArray[np.float32]) -> None:
    kernels.search_affine(
        u16(1, 4), "F16", 4, 2, None, "none", ONE, rule, 1, "fp16", 0.0, f32(1, 2), offsets, f64(1, 2)
    )


def ladder(kernels: KernelSet, element: str, rungs: NDArray[np.float32], *codes: NDArray[np.uint8]) -> None:
    first, last, chosen = codes or (u8(1, 2),) * 3
    kernels.search_ladder(
        u16(1, 4), "F16", element, 2, None, "none", rungs, first, last, chosen.copy(), f64(1, 2)
    )  # fmt: skip


def grid(kernels: KernelSet, bits: int, codes: NDArray[np.uint8]) -> int:
    return kernels.search_grid(u16(1, 4), "F16", bits, 2, None, ONE, f32(1, 2), codes, f64(1, 2))


WRONG: dict[str, tuple[str, Callable[[KernelSet], Any]]] = {
    "widen shape": ("out", lambda k: k.widen(u16(2, 3), "BF16", f32(3, 2))),
    "widen dtype name": ("dtype", lambda k: k.widen(u16(2, 3), "F64", f32(2, 3))),
    "widen dtype of array": ("src", lambda k: k.widen(f32(2, 3), "BF16", f32(2, 3))),
    "widen no rows": ("src", lambda k: k.widen(u16(0, 3), "BF16", f32(0, 3))),
    "widen no columns": ("src", lambda k: k.widen(u16(2, 0), "BF16", f32(2, 0))),
    "minmax groups": ("out_max", lambda k: k.group_minmax(f32(2, 5), 2, f32(2, 3), f32(2, 2))),
    "minmax group": ("group", lambda k: k.group_minmax(f32(2, 5), 0, f32(2, 3), f32(2, 3))),
    "rtn bits": ("bits", lambda k: k.rtn_int(u16(1, 4), "F16", 9, 2, True, u8(1, 4), f32(1, 2), u8(1, 2))),
    "rtn group": ("group", lambda k: k.rtn_int(u16(1, 4), "F16", 4, -1, True, u8(1, 4), f32(1, 2), u8(1, 2))),
    "rtn scales": ("scales", lambda k: k.rtn_int(u16(1, 4), "F16", 4, 2, True, u8(1, 4), f32(2, 1), u8(1, 2))),
    "rtn codes": ("codes", lambda k: k.rtn_int(u16(1, 4), "F16", 4, 2, True, u8(1, 5), f32(1, 2), u8(1, 2))),
    "rtn zeros": ("zeros", lambda k: k.rtn_int(u16(1, 4), "F16", 4, 2, True, u8(1, 4), f32(1, 2), u8(1, 3))),
    "pack words": ("out", lambda k: k.pack_bits(u8(1, 9), 4, u32(1, 1))),
    "pack bits": ("bits", lambda k: k.pack_bits(u8(1, 9), 1, u32(1, 1))),
    "unpack words": ("words", lambda k: k.unpack_bits(u32(1, 3), 4, u8(1, 16))),
    "unpack nothing": ("out", lambda k: k.unpack_bits(u32(1, 1), 4, u8(1, 0))),
    "transpose shape": ("out", lambda k: k.transpose_u32(u32(2, 3), u32(2, 3), 0)),
    "transpose row0": ("out", lambda k: k.transpose_u32(u32(2, 3), u32(3, 4), 3)),
    "transpose negative": ("out", lambda k: k.transpose_u32(u32(2, 3), u32(3, 4), -1)),
    "columns shape": ("out", lambda k: k.pack_columns(u8(2, 32), 4, u32(5, 2), 0)),
    "columns row0": ("out", lambda k: k.pack_columns(u8(2, 32), 4, u32(4, 2), 1)),
    "columns negative": ("out", lambda k: k.pack_columns(u8(2, 32), 4, u32(4, 2), -1)),
    "columns bits": ("bits", lambda k: k.pack_columns(u8(2, 32), 9, u32(9, 2), 0)),
    "columns ragged": ("codes", lambda k: k.pack_columns(u8(2, 9), 4, u32(2, 2), 0)),
    "columns nothing": ("codes", lambda k: k.pack_columns(u8(2, 0), 4, u32(0, 2), 0)),
    "split words": ("words", lambda k: k.split_words(u32(0, 3), 4, u8(0, 3))),
    "split bits": ("bits", lambda k: k.split_words(u32(2, 3), 3, u8(16, 3))),
    "split shape": ("out", lambda k: k.split_words(u32(2, 3), 4, u8(8, 3))),
    "narrow shape": ("out", lambda k: k.narrow_columns(f32(2, 3), u16(2, 3), 0)),
    "narrow row0": ("out", lambda k: k.narrow_columns(f32(2, 3), u16(3, 4), 3)),
    "narrow dtype": ("out", lambda k: k.narrow_columns(f32(2, 3), u32(3, 2), 0)),  # type: ignore[arg-type]
    "sums shape": ("stats", lambda k: k.sum_errors(f64(3, 5))),
    "sums nothing": ("stats", lambda k: k.sum_errors(f64(0, 6))),
    "both bits": ("bits", lambda k: both(k, 1, 2, f64(1, 3))),
    "both group": ("group", lambda k: both(k, 4, 0, f64(1, 3))),
    "both stats": ("stats", lambda k: both(k, 4, 2, f64(6, 1))),
    "dequantize scales": ("scales", lambda k: k.dequantize_int(u8(1, 4), f32(1, 1), u8(1, 2), 2, f32(1, 4))),
    "error stats": ("stats", lambda k: error(k, 4, f64(1, 5))),
    "error bits": ("bits", lambda k: error(k, 9, f64(1, 6))),
    "weighed sums": ("out", lambda k: k.weigh_squares(u16(1, 4), "F16", 2, None, "none", np.ones(2))),
    "weighed objective": ("objective", lambda k: k.weigh_squares(u16(1, 4), "F16", 2, None, "sum", np.ones(1))),
    "absmax out": ("out", lambda k: k.group_absmax(u16(2, 5), "BF16", 2, f32(2, 2))),
    "absmax group": ("group", lambda k: k.group_absmax(u16(2, 5), "BF16", 0, f32(2, 5))),
    "absmax nothing": ("src", lambda k: k.group_absmax(u16(2, 0), "BF16", 2, f32(2, 1))),
    "range out": ("out_max", lambda k: k.group_range(u16(2, 5), "BF16", 2, f32(2, 3), f32(2, 2))),
    "encode element": ("element", lambda k: k.encode_scaled(u16(1, 4), "F16", "e4m3", 2, f32(1, 2), u8(1, 4))),
    "encode int9": ("element", lambda k: k.encode_scaled(u16(1, 4), "F16", "int9", 2, f32(1, 2), u8(1, 4))),
    "encode scales": ("scales", lambda k: k.encode_scaled(u16(1, 4), "F16", "int4", 2, f32(2, 1), u8(1, 4))),
    "encode codes": ("codes", lambda k: k.encode_scaled(u16(1, 4), "F16", "int4", 2, f32(1, 2), u8(1, 5))),
    "encode group": ("group", lambda k: k.encode_scaled(u16(1, 4), "F16", "int4", 0, f32(1, 2), u8(1, 4))),
    "search bits": ("bits", lambda k: search(k, bits=9)),
    "search group": ("group", lambda k: search(k, group=0)),
    "search importance": ("importance", lambda k: search(k, importance=np.ones(3, np.float32))),
    "search importance below 0": ("importance", lambda k: search(k, importance=np.full(4, -1, np.float32))),
    "search importance NaN": ("importance", lambda k: search(k, importance=np.full(4, np.nan, np.float32))),
    "search objective": ("objective", lambda k: search(k, objective="cube")),
    "search no factors": ("factors", lambda k: search(k, factors=np.ones(0, np.float32))),
    "search factors": ("factors", lambda k: search(k, factors=np.ones(257, np.float32))),
    "search factor 0": ("factors", lambda k: search(k, factors=np.zeros(2, np.float32))),
    "search signs": ("signs", lambda k: search(k, signs="negative")),
    "search sweeps": ("sweeps", lambda k: search(k, sweeps=65)),
    "search scale": ("scale", lambda k: search(k, scale="e8m0")),
    "search scales": ("scales", lambda k: search(k, scales=f32(1, 3))),
    "search losses": ("losses", lambda k: search(k, losses=f64(1, 3))),
    "lines rule": ("rule", lambda k: lines(k, "subtract", f32(1, 2))),
    "lines offsets": ("offsets", lambda k: lines(k, "bias", f32(1, 1))),
    "ladder element": ("element", lambda k: ladder(k, "int4", np.ones(256, np.float32))),
    "ladder size": ("ladder", lambda k: ladder(k, "e2m1", np.ones(255, np.float32))),
    "ladder below 0": ("ladder", lambda k: ladder(k, "e2m1", np.full(256, -1, np.float32))),
    "ladder first": ("first", lambda k: ladder(k, "e2m1", np.ones(256, np.float32), u8(1, 1), u8(1, 2), u8(1, 2))),
    "ladder chosen": ("chosen", lambda k: ladder(k, "e2m1", np.ones(256, np.float32), u8(1, 2), u8(1, 2), u8(2, 2))),
    "grid bits": ("bits", lambda k: grid(k, 1, u8(1, 4))),
    "grid codes": ("codes", lambda k: grid(k, 4, u8(1, 5))),
    "affine rule": ("rule", lambda k: affine(k, 4, "zero", f32(1, 2))),
    "affine bits": ("bits", lambda k: affine(k, 9, "subtract", f32(1, 2))),
    "affine offsets": ("offsets", lambda k: affine(k, 4, "subtract", f32(1, 1))),
    "decode element": ("element", lambda k: k.decode_scaled(u8(1, 4), "fp8", f32(1, 2), 2, f32(1, 4))),
    "decode scales": ("scales", lambda k: k.decode_scaled(u8(1, 4), "e2m1", f32(1, 1), 2, f32(1, 4))),
    "decode out": ("out", lambda k: k.decode_scaled(u8(1, 4), "e2m1", f32(1, 2), 2, f32(4, 1))),
    "decode rule": ("rule", lambda k: k.decode_affine(u8(1, 4), f32(1, 2), f32(1, 2), 2, "subtract", f32(1, 4))),
    "decode offsets": ("offsets", lambda k: k.decode_affine(u8(1, 4), f32(1, 2), f32(1, 3), 2, "bias", f32(1, 4))),
    "scaled codes": ("codes", lambda k: k.error_scaled(u16(1, 4), "F16", "e2m1", u8(1, 0), f32(1, 2), 2, f64(1, 6))),
    "scaled stats": ("stats", lambda k: k.error_scaled(u16(1, 4), "F16", "e2m1", u8(1, 4), f32(1, 2), 2, f64(1, 5))),
    "values shape": ("values", lambda k: k.error_values(u16(1, 4), "F16", f32(4, 1), 2, f64(1, 6))),
    "values of weights": ("src", lambda k: k.error_values(f32(1, 4), "F16", f32(1, 4), 2, f64(1, 6))),
    "values dtype": ("values", lambda k: k.error_values(u16(1, 4), "F16", f64(1, 4), 2, f64(1, 6))),  # type: ignore[arg-type]
    "values nothing": ("src", lambda k: k.error_values(u16(1, 0), "F16", f32(1, 0), 2, f64(1, 6))),
    "values name": ("dtype", lambda k: k.error_values(u16(1, 4), "F8", f32(1, 4), 2, f64(1, 6))),
    "values group": ("group", lambda k: k.error_values(u16(1, 4), "F16", f32(1, 4), 0, f64(1, 6))),
    "values stats": ("stats", lambda k: k.error_values(u16(1, 4), "F16", f32(1, 4), 2, f64(1, 5))),
    "affine sum": ("rule", lambda k: affine_error(k, 4, "")),
    "affine width": ("bits", lambda k: affine_error(k, 1, "zero")),
}  # fmt: skip


@pytest.fixture(params=["reference", "native"])
def either(request: pytest.FixtureRequest) -> KernelSet:
    return load("reference" if request.param == "reference" else "baseline")


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments_are_named(either: KernelSet, case: str) -> None:
    name, call = WRONG[case]
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        call(either)


def test_strided_and_read_only_arrays_are_refused() -> None:
    kernels = load("baseline")
    with pytest.raises(ValueError, match="src: expected a C-contiguous"):
        kernels.widen(u16(4, 6)[:, ::2], "BF16", f32(4, 3))
    with pytest.raises(ValueError, match="src: expected a C-contiguous"):
        kernels.widen(np.asfortranarray(u16(4, 6)), "BF16", f32(4, 6))
    sealed = f32(4, 6)
    sealed.flags.writeable = False
    with pytest.raises(ValueError, match="out: expected a writable"):
        kernels.widen(u16(4, 6), "BF16", sealed)
    kernels.widen(sealed, "F32", f32(4, 6))


def test_what_is_no_array_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="src: expected a numpy array, found list"):
        load("baseline").widen([[1.0]], "F32", f32(1, 1))  # type: ignore[arg-type]


def test_a_refused_call_leaves_no_buffer_locked() -> None:
    data = bytearray(64)
    with pytest.raises(ValueError, match="out: expected shape"):
        load("baseline").pack_bits(np.frombuffer(data, np.uint8).reshape(2, 32), 4, u32(3, 3))
    data.append(0)


def test_a_huge_group_is_the_row() -> None:
    for row in sets():
        if row.usable:
            codes, scales, zeros = u8(1, 40), f32(1, 1), u8(1, 1)
            assert load(row.name).rtn_int(f32(1, 40), "F32", 4, 2**62, True, codes, scales, zeros) == 0
            assert scales[0, 0] == -0.125
