"""What a worker holds while it makes a slab: tiles of source rows, codes that outputs share, arrays of each output."""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from shardq.figures import Losses, sum_losses
from shardq.kernels import KernelSet
from shardq.layouts import find_layout
from shardq.layouts.base import Layout, OutSpec
from shardq.quantizers.buffers import Buffers
from shardq.quantizers.rtn import measure_rows
from shardq.tasks import Member, QuantizeTask, Target

if TYPE_CHECKING:
    from shardq.importance_vectors import Ref
    from shardq.schemes import Scheme
    from shardq.search import Search

WEIGHT_ARRAYS: Final[Mapping[str, type]] = {"BF16": np.uint16, "F16": np.uint16, "F32": np.float32}
TARGET_ARRAYS: Final[Mapping[str, type]] = {  # patterns where numpy has no such type
    "I32": np.int32, "U32": np.uint32, "I64": np.int64, "I8": np.int8, "U8": np.uint8, "F8_E4M3": np.uint8,
    "F16": np.float16, "BF16": np.uint16, "F32": np.float32,
}  # fmt: skip
Extent = tuple[NDArray[np.uint8], int]  # bytes in memory, offset in the output file
# What decides codes: the scheme, the magnitude that it reaches for, how scales are searched, and what errors count.
Way: TypeAlias = "tuple[Scheme, float | None, Search | None, Ref | None]"


@dataclass(frozen=True, slots=True)
class Making:
    """One output's part of a slab while it is made."""

    member: Member
    task: QuantizeTask
    layout: Layout
    specs: tuple[OutSpec, ...]
    out: dict[str, NDArray[Any]]  # suffix -> the slab's array
    stats: NDArray[np.float64] | None  # figures of each row [rows of the slab, 6]; those of its `Rows` where codes are
    # kept, none of what is only decoded


@dataclass(frozen=True, slots=True)
class Tile:
    """Some rows of a slab, valid until the next ones."""

    row: int  # the first, in the slab
    rows: NDArray[Any]  # as kernels take weights of `dtype`
    dtype: str
    wide: NDArray[np.float32] | None = None  # of an encoded matrix the same before they were rounded
    parts: Mapping[str, NDArray[Any]] | None = None  # and what they are made of


@dataclass(frozen=True, slots=True)
class Rows:
    """Room for codes, which all outputs that want the same share, and the figures of each row of a slab."""

    buffers: Buffers
    stats: NDArray[np.float64]  # [rows of the slab, 6]
    losses: NDArray[np.float64] | None = None  # of a search [rows of the slab, 3]


def write_values(specs: Iterable[OutSpec], out: Mapping[str, NDArray[Any]]) -> None:
    """Fill the arrays whose content no weight decides."""
    for spec in specs:
        if spec.values and out[spec.suffix].size:
            out[spec.suffix][:] = spec.values


def way_of(task: QuantizeTask) -> "Way | None":
    """None for what is only decoded, carried, or tuned."""
    if task.scheme is None or task.goal or task.tuned:
        return None
    return (task.scheme, task.amax, task.search, task.importance)


def losses_of(making: Making, ways: Mapping[Way, Rows]) -> Losses | None:
    way = way_of(making.task)
    found = ways[way].losses if way else None
    return None if found is None else sum_losses(found)


def measure_written(making: Making, weights: NDArray[Any], dtype: str, there: slice, kernels: KernelSet) -> None:
    """Figures of some rows of a slab as the layout reads what it wrote; it has the weight's rows first."""
    assert making.task.scheme
    assert making.stats is not None
    scheme = making.task.scheme
    read = making.layout.unpack({k: v[there] for k, v in making.out.items()}, scheme, kernels)
    measure_rows(weights, dtype, making.layout.unpacks_to(scheme), read, making.stats[there], kernels)


def specs_of(task: QuantizeTask) -> tuple[OutSpec, ...]:
    if task.scheme is None:
        return tuple(OutSpec(t.suffix, t.dtype, t.shape, 1 if task.turned else 0) for t in task.targets)
    return find_layout(task.layout).outputs(task.scheme, task.dtype, task.rows, task.columns)


def slab_shapes(task: QuantizeTask, specs: Iterable[OutSpec]) -> dict[str, tuple[tuple[int, ...], type]]:
    """Shape and type of the array that a slab writes of each tensor."""
    return {s.suffix: (s.slab_shape(task.row, task.end_row), TARGET_ARRAYS[s.dtype]) for s in specs}


def offset_of(task: QuantizeTask, spec: OutSpec, target: Target) -> int | None:
    """Where a slab's array of a tensor begins in its file; None where it lies there in pieces, one a row."""
    shape = spec.slab_shape(task.row, task.end_row)
    if shape == spec.shape:
        return target.begin
    if spec.slab_axis != 0:
        return None
    row_bytes = np.dtype(TARGET_ARRAYS[spec.dtype]).itemsize * math.prod(shape[1:])
    return target.begin + spec.slab_range(task.row, task.end_row)[0] * row_bytes


def extents_of(task: QuantizeTask, specs: tuple[OutSpec, ...], out: Mapping[str, NDArray[Any]]) -> Iterator[Extent]:
    """The runs of bytes that a slab occupies in its file: one for a whole tensor, one a row where rows are columns."""
    for spec, target in zip(specs, task.targets, strict=True):
        array = out[spec.suffix]
        if array.size == 0:
            continue
        if (offset := offset_of(task, spec, target)) is not None:
            yield array.reshape(-1).view(np.uint8), offset
            continue
        first = spec.slab_range(task.row, task.end_row)[0]
        for i, line in enumerate(array):
            yield line.view(np.uint8), target.begin + (i * spec.shape[1] + first) * array.itemsize
