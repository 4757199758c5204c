"""Pack a matrix as a worker does: in slabs, each in tiles, each slab's arrays full of rubbish before."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from numpy.typing import NDArray

from shardq.kernels import KernelSet, load
from shardq.layouts.base import Layout
from shardq.making import TARGET_ARRAYS, write_values
from shardq.quantizers.quantized import Quantized
from shardq.schemes import Scheme

settings.register_profile("patient", settings.default, deadline=None)  # a loaded machine is no failure
settings.load_profile("patient")

Pack = Callable[..., dict[str, NDArray[Any]]]


@pytest.fixture(scope="session")
def kernels() -> KernelSet:
    """The kernels that a run would use here."""
    return load()


@pytest.fixture(scope="session")
def pack_whole(kernels: KernelSet) -> Pack:
    """A function that packs quantized rows in tiles and slabs of so many rows and joins the slabs."""

    def pack(
        layout: Layout,
        scheme: Scheme,
        q: Quantized,
        *,
        dtype: str = "BF16",
        tile: int = 1 << 20,
        slab: int = 1 << 20,
        rubbish: int = 0xA5,
    ) -> dict[str, NDArray[Any]]:
        rows, columns = q.codes.shape
        specs = layout.outputs(scheme, dtype, rows, columns)
        whole: dict[str, NDArray[Any]] = {s.suffix: np.empty(s.shape, TARGET_ARRAYS[s.dtype]) for s in specs}
        for begin in range(0, rows, slab):
            end = min(rows, begin + slab)
            out: dict[str, NDArray[Any]] = {}
            for s in specs:
                out[s.suffix] = np.empty(s.slab_shape(begin, end), TARGET_ARRAYS[s.dtype])
                out[s.suffix].reshape(-1).view(np.uint8)[:] = rubbish
            write_values(specs, out)
            for row in range(begin, end, tile):
                part = slice(row, min(end, row + tile))
                layout.pack(q.rows(part), row - begin, out, scheme, kernels)
            for s in specs:
                if s.slab_axis is None:
                    if begin == 0:
                        whole[s.suffix][:] = out[s.suffix]
                    continue
                first, last = s.slab_range(begin, end)
                where = (slice(first, last),) if s.slab_axis == 0 else (slice(None), slice(first, last))
                whole[s.suffix][where] = out[s.suffix]
        return whole

    return pack
