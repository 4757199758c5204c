"""Read quantized modules back by ranges, and check what they say of themselves."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from shardq.figures import sum_figures
from shardq.files.safetensors import Header
from shardq.kernels import KernelSet, load
from shardq.layouts.base import Layout, Place
from shardq.ledger import COUNTED, SUMMED, Errors
from shardq.making import TARGET_ARRAYS, write_values
from shardq.outputs import target_of
from shardq.quantizers.float_scales import FLOAT_SCALES
from shardq.quantizers.quantized import Quantized
from shardq.schemes import Scheme, parse_name
from shardq.sources.base import Source

SUM_TOLERANCE: Final = 1e-12  # a ledger's sums are rounded once for each slab, and once for all slabs
NEAR_ZERO: Final = {"cosine": 1e-12, "sqnr_db": 1e-9}  # absolute tolerances of what may lie on both sides of zero


@dataclass(frozen=True, slots=True)
class OutputShard:
    """One weight file of an output."""

    source: Source
    file: str
    header: Header


def read_arrays(shard: OutputShard, place: Place) -> dict[str, NDArray[Any]]:
    """The tensors of one module of a shard, by suffix. Raises SourceUnreadable, CorruptShard, HubAccess and
    HubTransfer."""
    prefix = place.module + "."
    wanted = {t.name.removeprefix(prefix): t for t in shard.header.tensors if t.name.startswith(prefix)}
    return {
        suffix: np.frombuffer(
            shard.source.read(shard.file, *place.slice_of(t.begin, t.end)), TARGET_ARRAYS[t.dtype]
        ).reshape(t.shape[1:] if place.count else t.shape)
        for suffix, t in wanted.items()
        if t.dtype in TARGET_ARRAYS
    }


def read_module(shard: OutputShard, place: Place, layout: Layout, scheme: Scheme, kernels: KernelSet) -> Quantized:
    """Codes, scales and zero points of one module of a shard. Raises as read_arrays."""
    return layout.unpack(read_arrays(shard, place), scheme, kernels)


def check_packing(
    name: str, entry: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]], q: Quantized, layout: Layout,
    kernels: KernelSet,
) -> Iterator[str]:  # fmt: skip
    """Tensors of a module that differ from what packing gives of `q`, which was unpacked from them: where they hold
    what no weight decides, as the group of each column, zero points of a symmetric scheme, and bits between words."""
    scheme = layout.settle(parse_name(entry["scheme"]))
    specs = layout.outputs(scheme, entry["dtype"], *entry["shape"])
    made: dict[str, NDArray[Any]] = {s.suffix: np.zeros(s.shape, TARGET_ARRAYS[s.dtype]) for s in specs}
    write_values(specs, made)
    layout.pack(q, 0, made, scheme, kernels)
    differing = [suffix for suffix, array in made.items() if array.tobytes() != arrays[suffix].tobytes()]
    if differing:
        yield f"{name}: its {', '.join(differing)} are not what {entry['scheme']} makes of its codes and scales"


def check_module(name: str, entry: Mapping[str, Any], shard: OutputShard, layout: Layout) -> Iterator[str]:
    """Problems of a quantized tensor that show without its source: a wrong shape after unpacking, scales that are NaN,
    infinite, or zero where its scheme has no such scale, zero points that its scheme does not have, a scale of
    activations that is not above zero."""
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
    if q.input_scale is not None and not 0 < q.input_scale < math.inf:
        yield f"{name}: has a scale of activations of {q.input_scale:g}: expected one above 0"
    if scheme.symmetric and q.zeros is not None and (q.zeros != 1 << (scheme.bits - 1)).any():
        yield f"{name}: has zero points other than {1 << (scheme.bits - 1)} although the scheme is symmetric"


def check_figures(
    name: str, entry: Mapping[str, Any], stats: NDArray[np.float64], has_codes: bool = True
) -> Iterator[str]:
    """As check_errors, with the figures of all rows of the tensor, [rows, 6] as the kernels give them."""
    return check_errors(name, entry, Errors(sum_figures(stats, load()), math.prod(entry["shape"])), has_codes)


def check_errors(name: str, entry: Mapping[str, Any], found: Errors, has_codes: bool = True) -> Iterator[str]:
    """Where a ledger entry disagrees with what was measured; `has_codes`: what is counted on codes is among it. An
    entry of an earlier version has fewer figures."""
    for key, value in found.describe().items():
        said = entry.get(key, value)
        if key in COUNTED and not has_codes:
            continue
        if key in SUMMED and value is not None and isinstance(said, int | float):
            if math.isclose(value, said, rel_tol=SUM_TOLERANCE, abs_tol=NEAR_ZERO.get(key, 0.0)):
                continue
        elif value == said:
            continue
        yield f"{name}: {key} is {value!r} against the source: the ledger says {said!r}"
