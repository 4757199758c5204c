"""Rows with codes that were tuned for them: packed as codes that a worker makes, and measured."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from shardq.figures import COUNTS
from shardq.kernels import KernelSet
from shardq.making import Making, Tile, measure_written
from shardq.quantizers.rtn import measure_rows
from shardq.tuned import TunedRef, read_factors, read_tuned


def as_tuned(ref: TunedRef, rows: NDArray[Any], dtype: str, row: int, kernels: KernelSet) -> tuple[NDArray[Any], str]:
    """Rows from `row` on as they were when they got these codes, and their type: multiplied by what the tuning had, as
    fp32, where it had any. Raises BadTuned."""
    if not ref.is_scaled:
        return rows, dtype
    wide = np.empty(rows.shape, np.float32)
    kernels.widen(rows, dtype, wide)
    read_factors(ref).apply(wide, row)
    return wide, "F32"


def pack_tuned(tile: Tile, making: Making, kernels: KernelSet) -> bool:
    """Pack the codes of a tile's rows. Errors are those of the weight that got the codes, which may have been scaled
    before. False where they are not finite. Raises BadTuned."""
    task, stats = making.task, making.stats
    assert task.tuned
    assert task.scheme
    assert stats is not None
    row, count = task.row + tile.row, len(tile.rows)
    there = slice(tile.row, tile.row + count)
    part = read_tuned(task.tuned, row, row + count)
    making.layout.pack(part, tile.row, making.out, task.scheme, kernels)
    weights, dtype = as_tuned(task.tuned, tile.rows, tile.dtype, row, kernels)
    measure_rows(weights, dtype, task.scheme, part, stats[there], kernels)
    if task.reads_back:
        counts = stats[there, COUNTS].copy()
        measure_written(making, weights, dtype, there, kernels)
        stats[there, COUNTS] = counts
    return bool(np.isfinite(stats[there]).all())
