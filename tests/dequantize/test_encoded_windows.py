"""Any range of rows, alone, is that range of the whole; and needs no more bytes than it should."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardq.dequantize.base import Encoded
from shardq.dequantize.decoding import decode_rows, narrow_parts, read_parts
from shardq.kernels import KernelSet

Open = Callable[[str], Any]


def load_first(case: str, open_golden: Open, fast: KernelSet) -> tuple[Any, Encoded, Any]:
    file = open_golden(case)
    e = next(iter(file.find().encoded.values()))[-1]
    return file, e, file.decode(e, 0, e.rows, fast)


@given(data=st.data())
@settings(max_examples=12, deadline=None)
def test_rows_alone_are_those_of_the_whole(
    golden_case: str, open_golden: Open, fast: KernelSet, data: st.DataObject
) -> None:
    file, e, whole = load_first(golden_case, open_golden, fast)
    row = data.draw(st.integers(0, e.rows - 1))
    end_row = data.draw(st.integers(row + 1, e.rows))
    assert file.decode(e, row, end_row, fast).tobytes() == whole[row:end_row].tobytes()


@given(data=st.data())
@settings(max_examples=6, deadline=None)
def test_tiles_of_a_slab_are_those_rows(
    golden_case: str, open_golden: Open, fast: KernelSet, data: st.DataObject
) -> None:
    file, e, whole = load_first(golden_case, open_golden, fast)
    row = data.draw(st.integers(0, e.rows - 1))
    end_row = data.draw(st.integers(row + 1, e.rows))
    slab = read_parts(e, row, end_row, file.read)
    first = data.draw(st.integers(row, end_row - 1))
    behind = data.draw(st.integers(first + 1, end_row))
    out = np.empty((behind - first, e.columns), np.float32)
    decode_rows(e, narrow_parts(e, slab, (row, end_row), (first, behind)), first, behind, out, fast)
    assert out.tobytes() == whole[first:behind].tobytes()


@given(data=st.data())
@settings(max_examples=8, deadline=None)
def test_picked_rows_are_those_rows(golden_case: str, open_golden: Open, fast: KernelSet, data: st.DataObject) -> None:
    file, e, whole = load_first(golden_case, open_golden, fast)
    start = data.draw(st.integers(0, 3))
    stop = data.draw(st.integers(start + 4, e.rows))
    step = data.draw(st.integers(1, 3))
    picked = e.picked(start, stop, step)
    mine = whole[start:stop:step]
    assert picked.rows == len(mine)
    row = data.draw(st.integers(0, picked.rows - 1))
    assert file.decode(picked, row, picked.rows, fast).tobytes() == mine[row:].tobytes()
    again = picked.picked(0, picked.rows, 2)
    assert file.decode(again, 0, again.rows, fast).tobytes() == mine[::2].tobytes()


TURNABLE = ("fp8_block/ragged", "fp8_block/ragged_bf16", "fp8_3d/blocks", "fp8_3d/scalars", "fp8_channel/bf16",
            "mxfp8/ragged", "int8_channel/asymmetric", "bnb8/rows")  # fmt: skip


@pytest.mark.parametrize("case", TURNABLE)
@given(data=st.data())
@settings(max_examples=12, deadline=None)
def test_the_transpose_is_the_transpose(case: str, open_golden: Open, fast: KernelSet, data: st.DataObject) -> None:
    file, e, whole = load_first(case, open_golden, fast)
    turned = e.turned()
    assert (turned.rows, turned.columns) == (e.columns, e.rows)
    row = data.draw(st.integers(0, turned.rows - 1))
    end_row = data.draw(st.integers(row + 1, turned.rows))
    assert file.decode(turned, row, end_row, fast).tobytes() == whole.T[row:end_row].tobytes()
    odd = turned.picked(1, turned.rows, 2)
    assert file.decode(odd, 0, odd.rows, fast).tobytes() == whole.T[1::2].tobytes()


def test_codes_that_share_words_cannot_be_turned(open_golden: Open, fast: KernelSet) -> None:
    _, e, _ = load_first("mxfp4_ct/group32", open_golden, fast)
    with pytest.raises(ValueError, match="cannot be turned"):
        e.turned()


def test_windows_lie_inside_their_parts(golden_case: str, open_golden: Open, fast: KernelSet) -> None:
    """All windows of a cut into slabs need the codes once, but for words that two slabs share."""
    file, e, _ = load_first(golden_case, open_golden, fast)
    codes = e.part("codes")
    assert codes is not None
    size = file.refs[codes.tensor].size_bytes // (1 if e.index is None else e.index + 1)
    cuts = [(row, min(row + 16, e.rows)) for row in range(0, e.rows, 16)]
    for part in e.parts:
        total = 0
        for row, end_row in cuts:
            ranges = part.reads(row, end_row)
            total += sum(end - begin for begin, end in ranges)
            assert sum(end - begin for begin, end in ranges) == part.window_bytes(row, end_row)
            tensor = file.refs[part.tensor]
            assert all(tensor.begin <= begin < end <= tensor.end for begin, end in ranges)
            assert all(a[1] < b[0] for a, b in pairwise(ranges))
        if part is codes:
            assert size <= total <= size + 16 * len(cuts)
    assert e.source_bytes == sum(p.window_bytes(0, e.rows) for p in e.parts)
    assert np.prod((e.rows, e.columns)) > 0
