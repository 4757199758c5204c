"""Rows of every kind, bit for bit as the kind's own reader makes them."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from shardq.dequantize.decoding import code_rows, read_parts
from shardq.dequantize.kinds import KINDS
from shardq.dequantize.plain import PLAIN
from shardq.families import load_families
from shardq.kernels import KernelSet, load, sets

GOLDEN = Path(__file__).parent / "golden"
Open = Callable[[str], Any]
# Where the sign of a zero is not compared; all other bits must be the reader's.
UNSIGNED_ZEROS = {"bnb4/fp4"}  # code 8 is +0 in the file's own table, -0 in the library's kernel


def same_bits(found: NDArray[np.float32], expected: NDArray[np.float32], case: str) -> None:
    assert found.shape == expected.shape
    if case in UNSIGNED_ZEROS:
        found, expected = found + np.float32(0), expected + np.float32(0)
    differ = np.flatnonzero(found.view(np.uint32).ravel() != expected.view(np.uint32).ravel())
    at = differ[:4]
    assert differ.size == 0, f"{differ.size} differ, at {at}: {found.ravel()[at]} expected {expected.ravel()[at]}"


def test_rows_are_those_of_the_reader(golden_case: str, open_golden: Open, fast: KernelSet) -> None:
    file = open_golden(golden_case)
    found = file.find()
    assert found.problems == ()
    assert found.wanted == ()
    ((name, expected),) = file.expected().items()
    (matrices,) = found.encoded.values()
    assert list(found.encoded) == [name]
    stack = expected.reshape(-1, *expected.shape[-2:])
    assert [e.index for e in matrices] == (list(range(len(stack))) if expected.ndim == 3 else [None])
    for e, weight in zip(matrices, stack, strict=True):
        assert (e.name, e.kind) == (name, golden_case.partition("/")[0])
        same_bits(file.decode(e, 0, e.rows, fast), weight, golden_case)


def test_every_source_tensor_is_accounted_for(golden_case: str, open_golden: Open) -> None:
    file = open_golden(golden_case)
    found = file.find()
    source = {n for n in file.refs if not n.startswith("EXPECTED.")}
    assert found.consumed | set(found.dropped) == source
    assert not found.consumed & set(found.dropped)
    assert all(part.tensor in found.consumed for es in found.encoded.values() for e in es for part in e.parts)
    assert pickle.loads(pickle.dumps(found.encoded)) == found.encoded


@pytest.mark.parametrize("name", [s.name for s in sets() if s.usable and s.name != load().name])
def test_all_kernel_sets_agree(golden_case: str, name: str, open_golden: Open) -> None:
    file = open_golden(golden_case)
    ((_, expected),) = file.expected().items()
    (matrices,) = file.find().encoded.values()
    same_bits(
        file.decode(matrices[-1], 0, matrices[-1].rows, load(name)),
        expected.reshape(-1, *expected.shape[-2:])[-1],
        golden_case,
    )


def test_codes_stand_for_the_rows(golden_case: str, open_golden: Open, fast: KernelSet) -> None:
    """Canonical codes, where there are any, decoded by the formula of `Quantized`, are the same numbers."""
    file = open_golden(golden_case)
    e = next(iter(file.find().encoded.values()))[0]
    row, end_row = 8, e.rows
    coded = code_rows(e, read_parts(e, row, end_row, file.read), row, end_row, fast)
    without = ("bnb4", "bnb8")
    if e.kind in without or "act_order" in golden_case:
        assert coded is None
        return
    assert coded is not None
    q, out = coded.values, np.empty((end_row - row, e.columns), np.float32)
    scales = q.scales if q.global_scale is None else q.scales / np.float32(q.global_scale)
    if q.biases is not None:
        fast.decode_affine(q.codes, scales, q.biases, coded.group, "bias", out)
    elif q.zeros is not None:
        fast.dequantize_int(q.codes, scales, q.zeros, coded.group, out)
    else:
        fast.decode_scaled(q.codes, coded.element, scales, coded.group, out)
    same_bits(out, file.decode(e, row, end_row, fast), golden_case)


def test_every_kind_has_a_reader_and_a_golden_file() -> None:
    kinds = {source.id for source in load_families().sources}
    assert set(KINDS) == kinds | {PLAIN}
    assert {p.parent.name for p in GOLDEN.glob("*/*.safetensors")} == kinds
