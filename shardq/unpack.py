"""Read quantized modules back from disk, and measure them against the weights that they stand for."""

import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from shardq.arena import Arena
from shardq.files.atomic import pread_exact, reading
from shardq.files.safetensors import Header, HeaderTensor
from shardq.headers import read_checkpoint
from shardq.kernels import KernelSet, load
from shardq.layouts.base import Layout
from shardq.quantizers.quantized import Quantized
from shardq.schemes import Scheme, parse_name
from shardq.sources.base import Source
from shardq.worker import TARGET_ARRAYS, WEIGHT_ARRAYS

TILE_ROWS: Final = 512


def read_module(
    path: Path, header: Header, module: str, layout: Layout, scheme: Scheme, kernels: KernelSet
) -> Quantized:
    """Codes, scales and zero points of one module of a shard. Raises SourceUnreadable, CorruptShard."""
    prefix = module + "."
    wanted = {t.name.removeprefix(prefix): t for t in header.tensors if t.name.startswith(prefix)}
    with reading(path):
        fd = os.open(path, os.O_RDONLY)
    try:
        arrays = {s: _read(fd, t, path.name) for s, t in wanted.items() if t.dtype in TARGET_ARRAYS}
    finally:
        os.close(fd)
    return layout.unpack(arrays, scheme, kernels)


def check_module(name: str, entry: Mapping[str, Any], path: Path, header: Header, layout: Layout) -> Iterator[str]:
    """Problems of a quantized tensor that show without its source: a wrong shape after unpacking, scales that are zero,
    NaN or infinite, zero points that its scheme does not have."""
    kernels = load()
    scheme = parse_name(entry["scheme"])
    rows, columns = entry["shape"]
    q = read_module(path, header, name.removesuffix(".weight"), layout, scheme, kernels)
    if q.codes.shape != (rows, columns):
        yield f"{name}: unpacks to {list(q.codes.shape)}: expected {[rows, columns]}"
        return
    if not np.isfinite(q.scales).all() or not q.scales.all():
        yield f"{name}: has scales that are zero, NaN or infinite"
    if scheme.symmetric and (q.zeros != 1 << (scheme.bits - 1)).any():
        yield f"{name}: has zero points other than {1 << (scheme.bits - 1)} although the scheme is symmetric"


def check_against_source(
    ledger: Mapping[str, Mapping[str, Any]],
    source: Source,
    layout: Layout,
    headers: Mapping[str, Header],
    folder: Path,
) -> tuple[list[str], int]:
    """Problems, and how many tensors were compared: error figures are recomputed from the source's weights and the
    unpacked output, copies are compared byte for byte."""
    checkpoint = read_checkpoint(source)
    kernels, arena = load(), Arena()
    problems: list[str] = []
    for name, entry in ledger.items():
        ref = checkpoint.tensors.get(name)
        if (
            ref is None
            or ref.shape is None
            or ref.dtype is None
            or list(ref.shape) != entry["shape"]
            or ref.dtype != entry["dtype"]
        ):
            problems.append(f"{name} is not in the source as the ledger has it")
            continue
        raw = np.frombuffer(source.read(ref.shard, ref.begin, ref.end), np.uint8)
        header = headers[entry["file"]]
        if entry["outcome"] == "copied":
            tensor = next(t for t in header.tensors if t.name == name)
            with (folder / entry["file"]).open("rb") as f:
                f.seek(tensor.begin)
                if f.read(tensor.end - tensor.begin) != raw.tobytes():
                    problems.append(f"{name} differs from the source although it was copied")
            continue
        scheme = parse_name(entry["scheme"])
        q = read_module(folder / entry["file"], header, name.removesuffix(".weight"), layout, scheme, kernels)
        weights = _aligned(raw, WEIGHT_ARRAYS[ref.dtype], ref.shape, arena)
        figures = measure(weights, ref.dtype, q, scheme, kernels)
        for key, found in zip(("squared_error", "squared_weight", "max_error"), figures, strict=True):
            if found != entry[key]:
                problems.append(f"{name}: {key} is {found!r} against the source: the ledger says {entry[key]!r}")
    return problems, len(ledger)


def measure(
    weights: NDArray[Any], dtype: str, q: Quantized, scheme: Scheme, kernels: KernelSet
) -> tuple[float, float, float]:
    """Sum of squared errors, sum of squared weights and largest error of `q` against [rows, columns] weights, with the
    same kernel and the same exactly rounded sums as the worker."""
    rows, columns = weights.shape
    stats = np.empty((rows, 3), np.float64)
    group = scheme.group_columns(columns)
    for row in range(0, rows, TILE_ROWS):
        part = slice(row, min(rows, row + TILE_ROWS))
        kernels.error_int(weights[part], dtype, q.codes[part], q.scales[part], q.zeros[part], group, stats[part])
    return (
        math.fsum(stats[:, 0].tolist()),
        math.fsum(stats[:, 1].tolist()),
        float(stats[:, 2].max()),
    )


def _read(fd: int, t: HeaderTensor, file: str) -> NDArray[Any]:
    array: NDArray[Any] = np.empty(t.shape, TARGET_ARRAYS[t.dtype])
    pread_exact(fd, array.reshape(-1).view(np.uint8).data, t.begin, f"{t.name} in {file}")
    return array


def _aligned(raw: NDArray[np.uint8], dtype: type, shape: tuple[int, ...], arena: Arena) -> NDArray[Any]:
    """The bytes as an aligned array: tensor data may start anywhere in a file."""
    arena.reset(raw.size)
    array = arena.take(shape, dtype)
    array.reshape(-1).view(np.uint8)[:] = raw
    return array
