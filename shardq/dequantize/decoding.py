"""Rows of an encoded weight as fp32: the one way in for workers."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shardq.dequantize.base import Coded, Encoded, Part, Scaling
from shardq.dequantize.kinds import KINDS
from shardq.errors import NonFiniteWeight
from shardq.kernels import KernelSet

Ranges = Sequence[tuple[int, int]]


def read_parts(
    e: Encoded,
    row: int,
    end_row: int,
    read: Callable[[Part, Ranges], NDArray[np.uint8] | bytes],
    but: Collection[str] = (),
) -> dict[str, NDArray[Any]]:
    """The windows of all parts that rows `row` to `end_row` need, `but` those of some roles. `read` returns the bytes
    of some ranges of a part's shard, one behind the other."""
    wanted = ((p, ranges) for p, ranges in e.reads(row, end_row) if p.role not in but)
    return {p.role: e.shaped(p, read(p, ranges), row, end_row) for p, ranges in wanted}


def narrow_parts(
    e: Encoded, parts: Mapping[str, NDArray[Any]], rows: tuple[int, int], wanted: tuple[int, int]
) -> dict[str, NDArray[Any]]:
    """From the windows of `rows` those of `wanted`, some of them: a slab is read at once and decoded tile by tile."""
    whole, tile = e.stored_range(*rows), e.stored_range(*wanted)
    found = {}
    for p in (p for p in e.parts if p.role in parts):
        origin = p.window(*whole)[0]
        first, behind = (at - origin for at in p.window(*tile))
        stored = parts[p.role]
        found[p.role] = stored[first:behind] if p.axis != 1 else np.ascontiguousarray(stored[:, first:behind])
    return found


def decode_rows(
    e: Encoded,
    parts: Mapping[str, NDArray[Any]],
    row: int,
    end_row: int,
    out: NDArray[np.float32],
    kernels: KernelSet,
    checked: bool = True,
) -> None:
    """Rows `row` to `end_row` as fp32 to out [end_row - row, columns], from the windows of `read_parts`.

    The formula is the kind's; each operation is rounded once, and any range of rows has the bits that it has in the
    whole matrix. Raises NonFiniteWeight where a code or a scale is NaN or infinite, or their product is beyond fp32;
    unless `checked`, such weights are left to the caller to find.
    """
    first, behind = e.stored_range(row, end_row)
    step = 1 if e.pick is None else e.pick[2]
    stored = out if step == 1 else np.empty((behind - first, e.columns), np.float32)
    with np.errstate(all="ignore"):
        KINDS[e.kind].decode(e, parts, first, behind, stored, kernels)
    if step != 1:
        out[...] = stored[::step]
    if e.scaling:
        scale_rows(out, e.scaling, row)
    if checked and kernels.group_absmax(out, "F32", e.columns, np.empty((len(out), 1), np.float32)):
        raise _non_finite(e, out, row)


def scale_rows(rows: NDArray[np.float32], by: Scaling, row: int) -> None:
    """Multiply decoded rows of a matrix, the first of which is its `row`, in place. Each product is rounded once, and
    powers of two round only below the smallest normal number; beyond fp32 it is infinite."""
    with np.errstate(all="ignore"):
        if by.added:
            rows += np.float32(by.added)
        if by.rows:
            rows *= _powers(by.rows[row : row + len(rows)])[:, None]
        if by.factors:
            rows *= np.frombuffer(by.factors, np.dtype("<f4"))
        elif by.columns:
            rows *= _powers(by.columns)
        if by.added:
            rows -= np.float32(by.added)


def code_rows(
    e: Encoded, parts: Mapping[str, NDArray[Any]], row: int, end_row: int, kernels: KernelSet
) -> Coded | None:
    """Canonical codes of rows `row` to `end_row`, for layouts that hold the same numbers; None where the kind has none,
    where columns are in another order, and for rows that are not stored side by side."""
    if e.pick is not None and e.pick[2] != 1:
        return None
    if (groups := parts.get("groups")) is not None:
        in_order = np.arange(e.columns) // e.block[1]
        if not np.array_equal(groups[:, 0], in_order):
            return None
    return KINDS[e.kind].codes(e, parts, *e.stored_range(row, end_row), kernels)


def _powers(exponents: bytes) -> NDArray[np.float32]:
    return np.ldexp(np.float32(1), np.frombuffer(exponents, np.int8))


def _non_finite(e: Encoded, out: NDArray[np.float32], row: int) -> NonFiniteWeight:
    r, c = (int(x) for x in np.argwhere(~np.isfinite(out))[0])
    place = "" if e.index is None else f"[{e.index}]"
    shard = e.parts[0].shard
    return NonFiniteWeight(
        f"{e.name}{place} in {shard} decodes to {out[r, c]} at row {row + r}, column {c} ({e.kind}): expected finite "
        "weights; the checkpoint may be damaged"
    )
