"""Rows with codes that were tuned for them: packed as codes that a worker makes, and measured."""

import numpy as np

from shardq.figures import COUNTS
from shardq.kernels import KernelSet
from shardq.making import Making, Tile, measure_written
from shardq.quantizers.rtn import measure_rows
from shardq.tuned import read_factors, read_tuned


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
    weights, dtype = tile.rows, tile.dtype
    if task.tuned.is_scaled:
        weights, dtype = np.empty(tile.rows.shape, np.float32), "F32"
        kernels.widen(tile.rows, tile.dtype, weights)
        read_factors(task.tuned).apply(weights, row)
    measure_rows(weights, dtype, task.scheme, part, stats[there], kernels)
    if task.reads_back:
        counts = stats[there, COUNTS].copy()
        measure_written(making, weights, dtype, there, kernels)
        stats[there, COUNTS] = counts
    return bool(np.isfinite(stats[there]).all())
