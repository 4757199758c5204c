"""Comparison of a part with what it should be, for a layout that keeps a weight's rows together."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from shardq.audit_compare import compare
from shardq.audit_plan import plan_checks, span
from shardq.audit_subjects import Derived, Subject
from shardq.kernels import KernelSet, load
from shardq.layouts.auto_round import AutoRound
from shardq.layouts.base import OutSpec
from shardq.quantizers.quantized import Quantized
from shardq.schemes import Scheme
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
    done = compare(check, source, Held(result), layout, kernels)
    assert done.problem is None
    rows = check.cut.end_row - check.cut.row
    assert rows == (ROWS if budget_bytes is None else 64)
    assert done.bytes_compared == sum(rows * d.line_bytes for d in outputs)
    assert (done.stats is None) == (budget_bytes is not None)
    runs = [span(d, subject, check.cut) for d in outputs]
    for at in range(4, len(result), 97):
        changed = bytearray(result)
        changed[at] ^= 1 << at % 8
        problem = compare(check, source, Held(bytes(changed)), layout, kernels).problem
        assert (problem is not None) == any(begin <= at < end for begin, end in runs)
        assert problem is None or f"differs at byte {at} of the file" in problem
