"""Comparison of a part with what it should be, for a layout that keeps a weight's rows together."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from shardq.arena import Arena, reserve
from shardq.audit_compare import compare
from shardq.audit_plan import plan_checks, span
from shardq.audit_subjects import Derived, Subject
from shardq.checkpoint import TensorRef
from shardq.figures import FIGURES
from shardq.kernels import KernelSet, load
from shardq.layouts import find_layout
from shardq.layouts.auto_round import AutoRound
from shardq.layouts.base import OutSpec
from shardq.making import TARGET_ARRAYS
from shardq.quantizers.buffers import buffer_shapes, take_buffers
from shardq.quantizers.quantized import Quantized
from shardq.quantizers.rtn import quantize_rows
from shardq.schemes import PRESETS, Scheme
from shardq.sources.base import SourceFile

ROWS, COLUMNS = 256, 128
SCHEME = Scheme("int4", 32, symmetric=True)


class RowLayout(AutoRound):
    """Codes [rows, columns / 8] and scales [rows, groups]."""

    def outputs(self, scheme: Scheme, dtype: str, rows: int, columns: int) -> tuple[OutSpec, ...]:
        codes = OutSpec("packed", "I32", (rows, columns // 8), slab_axis=0)
        return codes, OutSpec("scale", "F16", (rows, scheme.groups(columns)), slab_axis=0)

    def pack(
        self, part: Quantized, row: int, out: Mapping[str, NDArray[Any]], scheme: Scheme, kernels: KernelSet
    ) -> None:
        words = np.empty((len(part.codes), COLUMNS // 8), np.uint32)
        kernels.pack_bits(part.codes, scheme.bits, words)
        out["packed"][row : row + len(words)] = words.view(np.int32)
        out["scale"][row : row + len(words)] = part.scales


@dataclass(frozen=True)
class Held:
    """One file in memory."""

    data: bytes
    label: str = "held"
    commit: str | None = None
    remote: bool = True

    def files(self) -> tuple[SourceFile, ...]:
        return (SourceFile("f", len(self.data), None),)

    def read(self, name: str, begin: int, end: int) -> bytes:
        assert 0 <= begin < end <= len(self.data)
        return self.data[begin:end]

    def local_path(self, name: str) -> Path | None:
        return None

    def fetch(self, name: str, target: Path, on_bytes: Callable[[int], None]) -> str | None:
        raise AssertionError(name)


@pytest.mark.parametrize("budget_bytes", [None, 40_000])
@pytest.mark.parametrize("window_bytes", [1, 30_000, 8 << 20])
def test_every_byte_of_a_run_of_rows_is_compared(
    budget_bytes: int | None, window_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shardq.audit_plan.WINDOW_BYTES", max(window_bytes, 100))
    layout, kernels = RowLayout(), load()
    weights = np.random.default_rng(3).standard_normal((ROWS, COLUMNS)).astype(np.float32)
    out: dict[str, NDArray[Any]] = {
        "packed": np.empty((ROWS, COLUMNS // 8), np.int32), "scale": np.empty((ROWS, COLUMNS // 32), np.float16)
    }  # fmt: skip
    q = Quantized(
        np.empty((ROWS, COLUMNS), np.uint8), np.empty((ROWS, COLUMNS // 32), np.float32),
        np.empty((ROWS, COLUMNS // 32), np.uint8),
    )  # fmt: skip
    kernels.rtn_int(weights, "F32", 4, 32, True, q.codes, q.scales, q.zeros)
    layout.pack(q, 0, out, SCHEME, kernels)
    result = b"head" + b"".join(a.tobytes() for a in out.values())
    begins = 4, 4 + out["packed"].nbytes
    specs = layout.outputs(SCHEME, "BF16", ROWS, COLUMNS)
    outputs = tuple(Derived(f"a.{s.suffix}", s, b) for s, b in zip(specs, begins, strict=True))
    row_bytes = 4 * COLUMNS
    subject = Subject(
        "a.weight", "quantized", "linear", "f", "f", "F32", 8, ROWS, COLUMNS, row_bytes, 32, SCHEME, outputs
    )
    source = Held(b"8 bytes." + weights.tobytes())
    (check,) = plan_checks([subject], budget_bytes, seed=4)
    done = compare(check, source, Held(result), layout, kernels, {})
    assert done.problem is None
    rows = check.cut.end_row - check.cut.row
    assert rows == (ROWS if budget_bytes is None else 64)
    assert done.bytes_compared == sum(rows * d.line_bytes for d in outputs)
    assert (done.stats is None) == (budget_bytes is not None)
    runs = [span(d, subject, check.cut) for d in outputs]
    for at in range(4, len(result), 97):
        changed = bytearray(result)
        changed[at] ^= 1 << at % 8
        problem = compare(check, source, Held(bytes(changed)), layout, kernels, {}).problem
        assert (problem is not None) == any(begin <= at < end for begin, end in runs)
        assert problem is None or f"differs at byte {at} of the file" in problem


@pytest.mark.parametrize("name", ["NVFP4A16", "FP8_TENSOR"])
def test_taken_scale_has_to_be_one_of_the_weights_that_are_read(name: str) -> None:
    layout, kernels = find_layout("compressed-tensors"), load()
    scheme = layout.settle(PRESETS[name].scheme)
    weights = np.random.default_rng(3).standard_normal((ROWS, COLUMNS)).astype(np.float32)
    amax = 1.5 * float(np.abs(weights).max())  # of a partner
    out = {s.suffix: np.empty(s.shape, TARGET_ARRAYS[s.dtype]) for s in layout.outputs(scheme, "F32", ROWS, COLUMNS)}
    arena, stats = Arena(), np.empty((ROWS, FIGURES), np.float64)
    arena.reset(reserve(*buffer_shapes(ROWS, COLUMNS, scheme)))
    buffers = take_buffers(arena, ROWS, COLUMNS, scheme)
    layout.pack(quantize_rows(weights, "F32", scheme, buffers, stats, kernels, amax)[0], 0, out, scheme, kernels)
    result, derived = bytearray(b"head"), []
    for spec in layout.outputs(scheme, "F32", ROWS, COLUMNS):
        derived.append(Derived(f"a.{spec.suffix}", spec, len(result)))
        result += out[spec.suffix].tobytes()
    ref = TensorRef("a.weight", "f", "F32", (ROWS, COLUMNS), 8, 8 + weights.nbytes)
    subject = Subject(
        "a.weight", "quantized", "linear", "f", "f", "F32", 8, ROWS, COLUMNS, 4 * COLUMNS, 32, scheme, tuple(derived),
        (ref,),
    )  # fmt: skip
    (check,) = plan_checks([subject], 100_000, seed=4)
    assert (check.scale, check.whole) == ("taken", False)
    source = Held(b"8 bytes." + weights.tobytes())
    assert compare(check, source, Held(bytes(result)), layout, kernels, {}).problem is None
    (whole,) = plan_checks([subject], None, seed=4)
    assert compare(whole, source, Held(bytes(result)), layout, kernels, {"a.weight": amax}).problem is None
    problem = compare(whole, source, Held(bytes(result)), layout, kernels, {"a.weight": amax / 1.5}).problem
    assert problem is not None
    assert "differs at byte" in problem
    problem = compare(whole, source, Held(bytes(result)), layout, kernels, {"a.weight": np.inf}).problem
    assert problem is not None
    assert "cannot be quantized" in problem

    at = derived[-1].begin
    of_all = np.frombuffer(result, np.float32, 1, at)[0]
    smaller = of_all * 8 if name == "NVFP4A16" else of_all / 8
    for value, words in ((smaller, "is the scale of magnitudes up to"), (np.nan, "is no scale that any weights")):
        result[at : at + 4] = np.float32(value).tobytes()
        problem = compare(check, source, Held(bytes(result)), layout, kernels, {}).problem
        assert problem is not None
        assert words in problem
        assert problem.startswith(derived[-1].name)
