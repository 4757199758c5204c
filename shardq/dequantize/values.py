"""Numbers as sources store them, as fp32 or bytes, exactly. Needs numpy; only workers import it."""

import functools
from collections.abc import Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from shardq.kernels import KernelSet

ARRAYS: Final[Mapping[str, "np.dtype[Any]"]] = {
    tag: np.dtype(kind)
    for tag, kind in {
        "U8": "<u1", "I8": "<i1", "I32": "<i4", "U32": "<u4", "I64": "<i8", "F32": "<f4", "F16": "<f2", "BF16": "<u2",
        "F8_E4M3": "<u1", "F8_E5M2": "<u1", "F8_E8M0": "<u1", "F8_E4M3FNUZ": "<u1", "F8_E5M2FNUZ": "<u1",
    }.items()
}  # fmt: skip
E8M0_BIAS: Final = 127
E8M0_NAN: Final = 255


@functools.cache
def byte_values(element: str) -> NDArray[np.float32]:
    """The 256 values of an 8-bit element. e8m0 is 2^(b - 127), and 255 is NaN (OCP MX 1.0); the fnuz floats have one
    NaN, 0x80, no infinity, no -0, and one more in the bias than those of OCP (torch 2.13)."""
    codes = np.arange(256)
    if element == "e8m0":
        powers: NDArray[np.float32] = np.ldexp(np.float32(1), codes - E8M0_BIAS).astype(np.float32)
        powers[E8M0_NAN] = np.nan
        return powers
    fnuz = element.endswith("fnuz")
    mantissa_bits, bias = {"e4m3fn": (3, 7), "e5m2": (2, 15), "e4m3fnuz": (3, 8), "e5m2fnuz": (2, 16)}[element]
    fraction, exponent = codes & ((1 << mantissa_bits) - 1), (codes & 0x7F) >> mantissa_bits
    steps = np.where(exponent == 0, fraction, fraction | (1 << mantissa_bits)).astype(np.float32)
    table: NDArray[np.float32] = np.ldexp(steps, np.maximum(exponent, 1) - bias - mantissa_bits).astype(np.float32)
    if element == "e4m3fn":
        table[0x7F] = np.nan
    if element == "e5m2":
        table[0x7C:0x80] = (np.inf, np.nan, np.nan, np.nan)
    table[128:] = -table[:128]
    if fnuz:
        table[128] = np.nan
    return table


ELEMENT_OF: Final[Mapping[str, str]] = {
    "F8_E4M3": "e4m3fn", "F8_E5M2": "e5m2", "F8_E8M0": "e8m0", "U8": "e8m0",
    "F8_E4M3FNUZ": "e4m3fnuz", "F8_E5M2FNUZ": "e5m2fnuz",
}  # fmt: skip


def scale_values(stored: NDArray[Any], dtype: str) -> NDArray[np.float32]:
    """Scales of any shape as fp32: floats as they are, a U8 as the exponent of a power of two."""
    if dtype == "F32":
        return np.asarray(stored, np.float32)
    if dtype == "BF16":
        return (stored.astype(np.uint32) << 16).view(np.float32)
    if dtype == "F16":
        return stored.astype(np.float32)
    found: NDArray[np.float32] = byte_values(ELEMENT_OF[dtype])[stored]
    return found


def stream_codes(words: NDArray[np.uint32], bits: int, first_bit: int, count: int) -> NDArray[np.uint8]:
    """`count` codes [lines, count] of the bit stream of each line of words [lines, n], from bit `first_bit` on."""
    at = first_bit + np.arange(count) * bits
    padded = np.concatenate([words, np.zeros((len(words), 1), np.uint32)], axis=1).astype(np.uint64)
    pairs = padded[:, at // 32] | (padded[:, at // 32 + 1] << np.uint64(32))
    return ((pairs >> (at % 32).astype(np.uint64)) & np.uint64((1 << bits) - 1)).astype(np.uint8)


def unpacked(lines: NDArray[Any], bits: int, columns: int, kernels: KernelSet) -> NDArray[np.uint8]:
    """Codes [rows, columns] of a bit stream for each row, least significant bit first, as bytes or words."""
    stream = np.ascontiguousarray(lines).view(np.uint8)
    needed = -(-columns * bits // 32) * 4
    if stream.shape[1] != needed:
        whole = np.zeros((len(stream), needed), np.uint8)
        whole[:, : stream.shape[1]] = stream
        stream = whole
    codes = np.empty((len(stream), columns), np.uint8)
    kernels.unpack_bits(stream.view(np.uint32), bits, codes)
    return codes


def turned_words(words: NDArray[Any], kernels: KernelSet) -> NDArray[np.uint32]:
    """The transpose of 32-bit words [n, rows], as [rows, n]."""
    source = np.ascontiguousarray(words).view(np.uint32)
    out = np.empty(source.shape[::-1], np.uint32)
    kernels.transpose_u32(source, out, 0)
    return out


def grid_rows(grid: NDArray[Any], block_rows: int, row: int, end_row: int) -> NDArray[Any]:
    """A window of a grid, whose first line is that of `row`, with a line for each of rows `row` to `end_row`."""
    if block_rows == 1:
        return np.ascontiguousarray(grid)
    return grid[np.arange(row, end_row) // block_rows - row // block_rows]
