"""Rows of encoded weights for a worker, tile by tile."""

from collections.abc import Callable
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from shardq.dequantize.base import Encoded, Part
from shardq.dequantize.decoding import Ranges, decode_rows, narrow_parts, read_parts
from shardq.errors import NotExact
from shardq.kernels import KernelSet
from shardq.layouts.stored import store

Read = Callable[[Part, Ranges], "NDArray[np.uint8] | bytes"]
HELD_BYTES: Final = 1 << 16  # of a part beside the codes, as scales of blocks are: reading it with each tile costs more
ROUNDED: dict[str, type] = {"BF16": np.uint16, "F16": np.float16, "F32": np.float32}


class DecodedRows:
    """Some rows of an encoded matrix. What is stored of them is read with each tile, or once where every line of it has
    some of each row, or where it is small."""

    def __init__(self, e: Encoded, rows: tuple[int, int], read: Read, kernels: KernelSet, checked: bool = True) -> None:
        """`rows`: the first, and the one behind the last; `read` as in `read_parts`, `checked` as in `decode_rows`."""
        self._encoded, self._rows, self._read, self._kernels, self._checked = e, rows, read, kernels, checked
        self._held = read_parts(e, *rows, read, () if e.is_strided else _large_parts(e, rows))

    def tile(
        self, row: int, end_row: int, out: NDArray[np.float32]
    ) -> tuple[NDArray[np.float32], dict[str, NDArray[Any]]]:
        """Rows `row` to `end_row` as fp32 in `out` [at least so many, columns]. Raises NonFiniteWeight, CorruptShard,
        and what reading raises."""
        e, wanted = self._encoded, (row, end_row)
        parts = read_parts(e, *wanted, self._read, self._held) | narrow_parts(e, self._held, self._rows, wanted)
        found = out[: end_row - row]
        decode_rows(e, parts, *wanted, found, self._kernels, self._checked)
        return found, parts


def _large_parts(e: Encoded, rows: tuple[int, int]) -> set[str]:
    """Roles of what is read with each tile."""
    codes, *sides = e.parts
    stored = e.stored_range(*rows)
    return {codes.role, *(p.role for p in sides if p.window_bytes(*stored) > HELD_BYTES)}


def round_rows(rows: NDArray[np.float32], dtype: str) -> NDArray[Any]:
    """fp32 rows as kernels take weights of a type: patterns of BF16 and F16, rounded half to even."""
    rounded = store(rows, np.dtype(ROUNDED[dtype]))
    return rounded if dtype == "F32" else rounded.view(np.uint16)


def keep_rows(e: Encoded, rows: NDArray[np.float32], dtype: str, kernels: KernelSet) -> NDArray[Any]:
    """Decoded rows as they are kept: rounded to a type. Raises NotExact where a fold by powers of two loses digits,
    as only F16 can, whose exponents end early."""
    rounded = round_rows(rows, dtype)
    if e.scaling and e.scaling.is_exact and dtype == "F16" == e.dtype:
        again = np.empty_like(rows)
        kernels.widen(rounded, dtype, again)
        if not np.array_equal(again, rows):
            raise NotExact(
                f"{e.name} in {e.parts[0].shard} is F16, and folded it has values below what F16 holds: expected none; "
                "leave out --fold"
            )
    return rounded
