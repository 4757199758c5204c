"""Read quantized modules back by ranges, and check what they say of themselves."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from shardq.files.safetensors import Header
from shardq.kernels import KernelSet, load
from shardq.layouts.base import Layout, Place
from shardq.outputs import target_of
from shardq.quantizers.float_scales import FLOAT_SCALES
from shardq.quantizers.quantized import Quantized
from shardq.schemes import Scheme, parse_name
from shardq.sources.base import Source
from shardq.worker import TARGET_ARRAYS

SUM_TOLERANCE: Final = 1e-12  # a ledger's sums of squares are rounded once for each slab, and once for all slabs


@dataclass(frozen=True, slots=True)
class OutputShard:
    """One weight file of an output."""

    source: Source
    file: str
    header: Header


def read_module(shard: OutputShard, place: Place, layout: Layout, scheme: Scheme, kernels: KernelSet) -> Quantized:
    """Codes, scales and zero points of one module of a shard. Raises SourceUnreadable, CorruptShard, HubAccess,
    HubTransfer."""
    prefix = place.module + "."
    wanted = {t.name.removeprefix(prefix): t for t in shard.header.tensors if t.name.startswith(prefix)}
    arrays: dict[str, NDArray[Any]] = {
        suffix: np.frombuffer(
            shard.source.read(shard.file, *place.slice_of(t.begin, t.end)), TARGET_ARRAYS[t.dtype]
        ).reshape(t.shape[1:] if place.count else t.shape)
        for suffix, t in wanted.items()
        if t.dtype in TARGET_ARRAYS
    }
    return layout.unpack(arrays, scheme, kernels)


def check_module(name: str, entry: Mapping[str, Any], shard: OutputShard, layout: Layout) -> Iterator[str]:
    """Problems of a quantized tensor that show without its source: a wrong shape after unpacking, scales that are NaN,
    infinite, or zero where its scheme has no such scale, zero points that its scheme does not have."""
    kernels = load()
    scheme = layout.settle(parse_name(entry["scheme"]))
    rows, columns = entry["shape"]
    q = read_module(shard, target_of(name, entry), layout, scheme, kernels)
    if q.codes.shape != (rows, columns):
        yield f"{name}: unpacks to {list(q.codes.shape)}: expected {[rows, columns]}"
        return
    may_be_zero = scheme.scale in FLOAT_SCALES  # of groups that are too small for any other
    biases = np.zeros(1) if q.biases is None else q.biases
    if not (np.isfinite(q.scales).all() and np.isfinite(biases).all() and (may_be_zero or q.scales.all())):
        yield f"{name}: has scales that are {'' if may_be_zero else 'zero, '}NaN or infinite"
    if scheme.symmetric and q.zeros is not None and (q.zeros != 1 << (scheme.bits - 1)).any():
        yield f"{name}: has zero points other than {1 << (scheme.bits - 1)} although the scheme is symmetric"


def check_figures(name: str, entry: Mapping[str, Any], stats: NDArray[np.float64]) -> Iterator[str]:
    """Where a ledger entry disagrees with the figures of all rows of its tensor, [rows, 3] as the kernels give them."""
    sums = zip(("squared_error", "squared_weight"), (math.fsum(stats[:, i].tolist()) for i in range(2)), strict=True)
    for key, found in sums:
        if not math.isclose(found, entry[key], rel_tol=SUM_TOLERANCE):
            yield f"{name}: {key} is {found!r} against the source: the ledger says {entry[key]!r}"
    largest = float(stats[:, 2].max())
    if largest != entry["max_error"]:
        yield f"{name}: max_error is {largest!r} against the source: the ledger says {entry['max_error']!r}"
