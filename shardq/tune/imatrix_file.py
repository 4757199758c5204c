"""Statistics as llama.cpp's importance matrix in GGUF.

Source: llama.cpp, tools/imatrix/imatrix.cpp (`save_imatrix`): `X.in_sum2` F32 [columns, slices] and `X.counts` F32
[1, slices] for each tensor X, `general.type` "imatrix", `imatrix.datasets`, `imatrix.chunk_count` and
`imatrix.chunk_size`.
"""

import os
from collections import defaultdict
from dataclasses import replace
from typing import Final

import numpy as np

from shardq.errors import BadImportance, MissingPackage, UnsupportedSource
from shardq.files.atomic import write_atomic
from shardq.files.gguf import GgufSpec, KeyValue, padding, plan_gguf
from shardq.gguf.architectures import find_architecture
from shardq.gguf.mapping import find_inputs
from shardq.gguf.parameters import read_parameters
from shardq.gguf.tensors import SourceTensor
from shardq.imatrix_names import find_wanted
from shardq.regrouping import Regrouping
from shardq.tune.stats import Moment, Statistics

CHUNK_TOKENS: Final = 512  # llama-imatrix's default


def write_imatrix(statistics: Statistics, path: str | os.PathLike[str], chunk_tokens: int) -> tuple[str, ...]:
    """Write the file, whole or not at all; `chunk_tokens`: of a sample. Modules that get the same input have a tensor
    each, as there. Returns the modules that llama.cpp has no name for, which are left out. Raises BadImportance where
    nothing is left, DiskFull, NotWritable.
    """
    found, unnamed = _tensors(statistics)
    if not found:
        raise BadImportance("llama.cpp has no names for the modules of this model: write shardq's own form")
    arrays: dict[str, np.ndarray[tuple[int, ...], np.dtype[np.float32]]] = {}
    for name in sorted(found):
        slices = [found[name][i] for i in sorted(found[name])]
        arrays[f"{name}.in_sum2"] = np.array([m.squares for m in slices], np.dtype("<f4"))
        arrays[f"{name}.counts"] = np.array([[m.tokens] for m in slices], np.dtype("<f4"))
    specs = [GgufSpec(name, "F32", tuple(reversed(a.shape))) for name, a in arrays.items()]
    plan = plan_gguf(_pairs(statistics, chunk_tokens), specs)
    data = bytearray(plan.size_bytes)
    data[: len(plan.header)] = plan.header
    for name, (begin, end) in plan.offsets.items():
        data[begin:end] = arrays[name].tobytes()
    assert all(not any(data[begin:end]) for begin, end in padding(plan))
    write_atomic(path, bytes(data))
    return unnamed


def _tensors(statistics: Statistics) -> tuple[dict[str, dict[int, Moment]], tuple[str, ...]]:
    """Tensor of llama.cpp -> its slices by number; and the modules that have none."""
    found: dict[str, dict[int, Moment]] = defaultdict(dict)
    unnamed = []
    for module, moment in statistics.modules.items():
        wanted = find_wanted(module)
        if wanted is not None:
            found[wanted.tensors[0]][wanted.expert or 0] = moment
            continue
        converted = _converted(statistics, module)
        for tensor, order in converted:
            squares = moment.squares if order is None else order.apply(moment.squares, 0)
            found[tensor][0] = replace(moment, squares=squares)
        if not converted:
            unnamed.append(module)
    return found, tuple(unnamed)


def _converted(statistics: Statistics, module: str) -> tuple[tuple[str, Regrouping | None], ...]:
    """What llama.cpp's converter makes of a module that the table of names does not have, as of linear attention."""
    shape, config = statistics.shapes.get(module), statistics.config
    if shape is None:
        return ()
    try:
        arch, parameters = find_architecture(config), read_parameters(config)
        return find_inputs(arch, parameters, SourceTensor(f"{module}.weight", shape))
    except (UnsupportedSource, MissingPackage):
        return ()  # the caller is told its name


def _pairs(statistics: Statistics, chunk_tokens: int) -> list[KeyValue]:
    tokens = statistics.provenance.tokens or 0
    data = statistics.provenance.text or statistics.provenance.data
    return [
        KeyValue("general.type", "string", "imatrix"),
        KeyValue("imatrix.datasets", "string", (data,)),
        KeyValue("imatrix.chunk_count", "u32", -(-tokens // chunk_tokens)),
        KeyValue("imatrix.chunk_size", "u32", chunk_tokens),
    ]
