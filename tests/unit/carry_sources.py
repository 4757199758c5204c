"""Sources for the tests of carrying: made by a layout or golden, and what comes of carrying them."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from shardq.arena import Arena, reserve
from shardq.carry import (
    carried_dtype,
    carried_scheme,
    fits,
    goal,
    needs_largest,
    target_scheme,
)
from shardq.carry_codes import carry_rows, largest_scale
from shardq.checkpoint import TensorRef
from shardq.dequantize.base import Encoded, Part
from shardq.dequantize.decoding import Ranges, decode_rows, read_parts
from shardq.dequantize.finding import find_encoded
from shardq.dequantize.hints import Hints, read_hints
from shardq.figures import FIGURES
from shardq.kernels import load
from shardq.layouts import find_layout
from shardq.layouts.base import Layout, ModuleChoice, unit_rows
from shardq.layouts.stored import store
from shardq.making import TARGET_ARRAYS, write_values
from shardq.quantizers.buffers import buffer_shapes, take_buffers
from shardq.quantizers.decode import decode_rows as decode_quantized
from shardq.quantizers.quantized import Quantized
from shardq.quantizers.rtn import quantize_rows
from shardq.schemes import Scheme, parse_scheme

MODULE: Final = "model.layers.0.self_attn.q_proj"
GOLDEN: Final = Path(__file__).parents[1] / "dequantize" / "golden"
ROWS, COLUMNS = 160, 320  # blocks of 128 are cut at both edges
FAMILY: Final = ("auto_round", "auto_round:gptqmodel", "gptq", "gptq_v2", "awq", "compressed-tensors", "mlx")
FLOATS: Final = ("compressed-tensors", "fp8", "mlx", "auto_round")
Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Source:
    """One encoded weight in memory."""

    e: Encoded
    hints: Hints
    content: bytes

    def parts(self, row: int, end_row: int) -> dict[str, NDArray[Any]]:
        return read_parts(self.e, row, end_row, self._read)

    def _read(self, _: Part, ranges: Ranges) -> bytes:
        return b"".join(self.content[begin:end] for begin, end in ranges)

    def decoded(self) -> NDArray[np.float32]:
        out = np.empty((self.e.rows, self.e.columns), np.float32)
        decode_rows(self.e, self.parts(0, self.e.rows), 0, self.e.rows, out, load())
        return out

    def scheme(self, symmetric: bool | None = None) -> Scheme:
        found = carried_scheme(self.e, self.hints, symmetric)
        assert found is not None
        return found


def open_source(tensors: Mapping[str, tuple[str, tuple[int, ...], bytes]], config: Mapping[str, Any]) -> Source:
    refs, content = [], b""
    for name, (dtype, shape, data) in tensors.items():
        refs.append(TensorRef(name, "shard", dtype, shape, len(content), len(content) + len(data)))
        content += data
    peeked = {t.name: content[t.begin : t.end] for t in find_encoded(refs, config).wanted}
    found = find_encoded(refs, config, peeked)
    assert found.problems == ()
    ((e, *_),) = found.encoded.values()
    return Source(e, read_hints(config), content)


def written(layout: Layout, scheme: Scheme, arrays: Arrays, dtype: str, shape: tuple[int, int] | None = None) -> Source:
    rows, columns = shape or (ROWS, COLUMNS)
    tensors = {
        f"{MODULE}.{s.suffix}": (s.dtype, s.shape, arrays[s.suffix].tobytes())
        for s in layout.outputs(scheme, dtype, rows, columns)
    }
    block = layout.config_block(scheme, [ModuleChoice(MODULE, "linear", scheme)], "0")
    return open_source(tensors, dict(layout.config_keys(block)))


def golden(case: str) -> Source:
    content = (GOLDEN / f"{case}.safetensors").read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    config = json.loads(header.pop("__metadata__")["config"])
    tensors = {
        name: (
            t["dtype"],
            tuple(t["shape"]),
            content[8 + size + t["data_offsets"][0] : 8 + size + t["data_offsets"][1]],
        )
        for name, t in header.items()
        if not name.startswith("EXPECTED.")
    }
    return open_source(tensors, config)


def empty(layout: Layout, scheme: Scheme, dtype: str, rows: int, columns: int) -> Arrays:
    specs = layout.outputs(scheme, dtype, rows, columns)
    out: Arrays = {s.suffix: np.full(s.shape, 1, TARGET_ARRAYS[s.dtype]) for s in specs}
    write_values(specs, out)
    return out


def pack(layout: Layout, scheme: Scheme, q: Quantized, dtype: str) -> Arrays:
    out = empty(layout, scheme, dtype, *q.codes.shape)
    layout.pack(q, 0, out, scheme, load())
    return out


def quantized(layout: Layout, scheme: Scheme, dtype: str = "F16") -> Source:
    """Random weights, with a group of zeros, as the layout's own quantizer and packing make of them."""
    weight = (np.random.default_rng(7).standard_normal((ROWS, COLUMNS)) * 0.02).astype(np.float32)
    weight[3, :64] = 0
    raw = store(weight, np.dtype(TARGET_ARRAYS[dtype])).view(np.uint16)
    arena = Arena()
    arena.reset(reserve(*buffer_shapes(ROWS, COLUMNS, scheme)))
    amax = None if scheme.reach == "group" else float(np.abs(weight).max())
    q, bad = quantize_rows(
        raw, dtype, scheme, take_buffers(arena, ROWS, COLUMNS, scheme), np.empty((ROWS, FIGURES)), load(), amax
    )
    assert bad == 0
    return written(layout, scheme, pack(layout, scheme, q, dtype), dtype)


def carried(s: Source, layout: Layout, target: Scheme, dtype: str, tile: int = 0) -> Arrays:
    """What `layout` writes, made in tiles."""
    e, to, kernels = s.e, goal(layout, target, dtype, s.e.rows, s.e.columns), load()
    out = empty(layout, target, dtype, e.rows, e.columns)
    step = tile or e.rows
    cuts = [(row, min(row + step, e.rows)) for row in range(0, e.rows, step)]
    largest = None
    if needs_largest(e, to):
        largest = max(largest_scale(e, s.parts(*c), *c, to, kernels) for c in cuts)
    for row, end_row in cuts:
        part = carry_rows(e, s.parts(row, end_row), row, end_row, to, kernels, largest)
        layout.pack(part, row, out, target, kernels)
    return out


def same(a: NDArray[np.float32], b: NDArray[np.float32]) -> bool:
    """To the bit, -0 counting as 0."""
    return (a + np.float32(0)).tobytes() == (b + np.float32(0)).tobytes()


def values(layout: Layout, scheme: Scheme, arrays: Arrays) -> NDArray[np.float32]:
    return decode_quantized(layout.unpack(arrays, scheme, load()), scheme, load())


def convert(s: Source, layout: Layout, symmetric: bool | None = None) -> Source:
    """The weight in another layout, checked to be the same."""
    own = s.scheme(symmetric)
    target = target_scheme(s.e, own, layout)
    assert target is not None, fits(s.e, own, layout.settle(own), layout)
    dtype = carried_dtype(s.e, own, target, layout)
    arrays = carried(s, layout, target, dtype, unit_rows(layout, target))
    assert same(values(layout, target, arrays), s.decoded())
    found = written(layout, target, arrays, dtype, (s.e.rows, s.e.columns))
    assert same(found.decoded(), s.decoded())
    return found


def settled(layout: str, name: str, **changed: Any) -> tuple[Layout, Scheme]:
    found = find_layout(layout)
    return found, found.settle(replace(parse_scheme(name).scheme, **changed))
