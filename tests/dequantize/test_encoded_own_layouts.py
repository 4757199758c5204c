"""What shardq writes, read as a source: the same numbers as the layout itself reads back."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from shardq.arena import Arena, reserve
from shardq.checkpoint import TensorRef
from shardq.dequantize.base import Part
from shardq.dequantize.decoding import Ranges, decode_rows, read_parts
from shardq.dequantize.finding import find_encoded
from shardq.figures import FIGURES
from shardq.kernels import KernelSet
from shardq.layouts import LAYOUTS
from shardq.layouts.base import Layout, ModuleChoice
from shardq.making import TARGET_ARRAYS, write_values
from shardq.quantizers.buffers import buffer_shapes, take_buffers
from shardq.quantizers.decode import decode_rows as decode_quantized
from shardq.quantizers.rtn import quantize_rows
from shardq.roles import Role
from shardq.schemes import PRESETS, WIDTHS, Scheme

MODULE = "model.layers.0.self_attn.q_proj"
ROWS, COLUMNS = 96, 192
# Scales of e5m3 in a byte: auto-round's own, for which no source kind stands.
UNREAD = {"NVFP4_E5M3"}


def held() -> list[tuple[Layout, Scheme]]:
    """Every layout with every scheme that it takes; `fake` holds plain weights."""
    pairs = []
    for layout in LAYOUTS:
        if layout.name == "fake":
            continue
        integers = [
            Scheme(f"int{b}", g, symmetric) for b in WIDTHS for g in (-1, 32, 64) for symmetric in (True, False)
        ]
        settled = dict.fromkeys(layout.settle(s) for s in [*integers, *(p.scheme for p in PRESETS.values())])
        pairs += [(layout, s) for s in settled if layout.refuse(s, s, ROWS, COLUMNS) is None]
    return pairs


def write(layout: Layout, scheme: Scheme, kernels: KernelSet) -> dict[str, np.ndarray[Any, Any]]:
    rng = np.random.default_rng(7)
    weight = (rng.standard_normal((ROWS, COLUMNS)) * 0.02).astype(np.float32)
    arena = Arena()
    arena.reset(reserve(*buffer_shapes(ROWS, COLUMNS, scheme)))
    buffers = take_buffers(arena, ROWS, COLUMNS, scheme)
    amax = None if scheme.reach == "group" else float(np.abs(weight).max())
    q, bad = quantize_rows(weight, "F32", scheme, buffers, np.empty((ROWS, FIGURES)), kernels, amax)
    assert bad == 0
    specs = layout.outputs(scheme, "BF16", ROWS, COLUMNS)
    out = {s.suffix: np.empty(s.shape, TARGET_ARRAYS[s.dtype]) for s in specs}
    write_values(specs, out)
    layout.pack(replace(q, input_scale=0.5 if scheme.calibrated else None), 0, out, scheme, kernels)
    return out


@pytest.mark.parametrize(("layout", "scheme"), held(), ids=lambda x: x.name)
def test_an_output_is_a_source(layout: Layout, scheme: Scheme, fast: KernelSet) -> None:
    out = write(layout, scheme, fast)
    block = layout.config_block(scheme, [ModuleChoice(MODULE, Role.LINEAR.value, scheme)], "0")
    refs, content, at = [], b"", 0
    for spec in layout.outputs(scheme, "BF16", ROWS, COLUMNS):
        data = out[spec.suffix].tobytes()
        refs.append(TensorRef(f"{MODULE}.{spec.suffix}", "shard", spec.dtype, spec.shape, at, at + len(data)))
        content, at = content + data, at + len(data)
    config = dict(layout.config_keys(block))
    peeked = {t.name: content[t.begin : t.end] for t in find_encoded(refs, config).wanted}
    found = find_encoded(refs, config, peeked)
    if scheme.name in UNREAD:
        assert [p.trait for p in found.problems] == ["shapes"]
        return
    assert found.problems == ()
    ((e,),) = found.encoded.values()
    assert (e.name, e.rows, e.columns, e.dtype) == (f"{MODULE}.weight", ROWS, COLUMNS, e.dtype)

    def read(_: Part, ranges: Ranges) -> bytes:
        return b"".join(content[begin:end] for begin, end in ranges)

    rows = np.empty((ROWS, COLUMNS), np.float32)
    decode_rows(e, read_parts(e, 0, ROWS, read), 0, ROWS, rows, fast)
    theirs = decode_quantized(layout.unpack(out, scheme, fast), layout.unpacks_to(scheme), fast)
    assert (rows + np.float32(0)).tobytes() == (theirs + np.float32(0)).tobytes()
