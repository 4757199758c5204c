"""What is read of weights that the source has encoded: blocks of rows, or of columns, within the limit."""

from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardq.audit_plan import Check, magnitude_bytes, plan_checks, span
from shardq.audit_subjects import Derived, Subject
from shardq.checkpoint import TensorRef
from shardq.dequantize.base import Encoded, Part
from shardq.dequantize.plain import plain_slices
from shardq.errors import BadOption
from shardq.layouts import LAYOUTS, find_layout
from shardq.layouts.base import Layout, OutSpec, unit_rows
from shardq.schemes import PRESETS, Scheme

MB = 10**6
WEIGHT = "a.weight"


def part(role: str, dtype: str, lines: int, width: int, axis: int | None, units: int = 1, per_rows: int = 1) -> Part:
    return Part(role, f"a.{role}", "s", dtype, 1000, lines, width, axis, units, per_rows)  # type: ignore[arg-type]


def encoded(kind: str, rows: int, columns: int, element: str, block: tuple[int, int], *parts: Part) -> Encoded:
    return Encoded(WEIGHT, kind, None, rows, columns, "BF16", parts, element, block)


def fp8(rows: int, columns: int) -> Encoded:
    """A scale for 128 rows and columns."""
    grid = -(-rows // 128), -(-columns // 128)
    scale = part("scale", "F32", *grid, 0, per_rows=128)
    return encoded("fp8_block", rows, columns, "e4m3fn", (128, 128), part("codes", "F8_E4M3", rows, columns, 0), scale)


def gptq(rows: int, columns: int, ordered: bool = True) -> Encoded:
    """Words of eight columns; any column of any group unless `ordered`."""
    parts = [
        part("codes", "I32", columns // 8, rows, 1),
        part("scale", "F16", columns // 128, rows, 1),
        part("zeros", "I32", columns // 128, rows // 8, 1, 4, 32),
    ]
    parts += [] if ordered else [part("groups", "I32", columns, 1, None)]
    return encoded("gptq", rows, columns, "int4", (1, 128), *parts)


def bnb4(rows: int, columns: int) -> Encoded:
    """Without lines, so that a window begins and ends within a byte's or a scale's elements."""
    codes = part("codes", "U8", rows * columns // 2, 1, 0, columns, 2)
    scale = part("scale", "F32", -(-rows * columns // 192), 1, 0, columns, 192)
    return encoded("bnb4", rows, columns, "nf4", (1, 192), codes, scale, part("map", "F32", 16, 1, None))


def turned(rows: int, columns: int) -> Encoded:
    """A slice [in, out] of plain floats."""
    (e,) = plain_slices(TensorRef("stack", "s", "BF16", (1, columns, rows), 8, 8 + 2 * rows * columns))
    return e.turned()


def alternating(rows: int, columns: int) -> Encoded:
    """Every second row of MXFP4."""
    parts = part("codes", "U8", 2 * rows, columns // 2, 0), part("scale", "U8", 2 * rows, columns // 32, 0)
    return encoded("mxfp4_gptoss", 2 * rows, columns, "e2m1", (1, 32), *parts).picked(0, 2 * rows, 2)


MAKERS: dict[str, Callable[[int, int], Encoded]] = {
    "fp8": fp8, "gptq": gptq, "act_order": lambda rows, columns: gptq(rows, columns, ordered=False), "bnb4": bnb4,
    "turned": turned, "alternating": alternating,
    "half": lambda rows, columns: turned(2 * rows, columns).picked(0, rows),
}  # fmt: skip
each_maker = pytest.mark.parametrize("maker", MAKERS)


def quantized(layout: Layout, scheme: Scheme, e: Encoded) -> Subject:
    outputs: list[Derived] = []
    begin = 1000
    for spec in layout.outputs(scheme, "BF16", e.rows, e.columns):
        outputs.append(Derived(f"a.{spec.suffix}", spec, begin))
        begin += outputs[-1].size_bytes
    ref = TensorRef(WEIGHT, "s", "BF16", (e.rows, e.columns), 0, 0, (e,))
    return Subject(
        WEIGHT, "quantized", "linear", "s", "f", "BF16", 0, e.rows, e.columns, 4 * e.columns, unit_rows(layout, scheme),
        scheme, tuple(outputs), () if scheme.reach == "group" else (ref,), (e,),
    )  # fmt: skip


def kept(e: Encoded, slices: int, as_columns: bool) -> Subject:
    """A stack that is only decoded."""
    spec = OutSpec("", "BF16", (e.columns, e.rows) if as_columns else (e.rows, e.columns), 1 if as_columns else 0)
    outputs = tuple(Derived(WEIGHT, spec, 1000 + n * 2 * e.rows * e.columns) for n in range(slices))
    return Subject(
        WEIGHT, "decoded", "expert_stack", "s", "f", "BF16", 0, e.rows, e.columns, 4 * e.columns, 1, None, outputs,
        encoded=(e,) * slices,
    )  # fmt: skip


def cost_bytes(check: Check) -> int:
    return check.source_bytes + check.result_bytes


def check_budget(s: Subject, share: float, seed: int) -> None:
    """A share of everything is kept, if it is enough for the least block; whatever is compared is read."""
    partner = replace(s, name="b.weight", reach=tuple(replace(t, name="b.weight") for t in s.reach))
    full_bytes = sum(map(cost_bytes, plan_checks([s, partner], None, seed)))
    budget_bytes = int(full_bytes * share)
    try:
        checks = plan_checks([s, partner], budget_bytes, seed)
    except BadOption:
        assert share < 1
        return
    assert sum(map(cost_bytes, checks)) <= budget_bytes or share >= 1
    for check in checks:
        cut = check.cut
        assert 0 <= cut.row < cut.end_row <= s.rows
        assert 0 <= cut.column < cut.end_column <= s.columns
        assert cut.row % s.unit_rows == 0
        for d in s.outputs:
            begin, end = span(d, s, cut)
            assert begin == end or any(b <= begin and end <= e for b, e in check.reads)
    assert share < 1 or all(c.whole for c in checks)


def held_schemes(layout: Layout) -> list[Scheme]:
    integers = [Scheme(f"int{b}", g, symmetric=True) for b in (2, 4, 8) for g in (-1, 32, 128)]
    settled = [layout.settle(s) for s in [*(p.scheme for p in PRESETS.values()), *integers]]
    return [s for s in dict.fromkeys(settled) if layout.refuse(s, s, 4096, 4096) is None]


@each_maker
@pytest.mark.parametrize("layout", [x for x in LAYOUTS if x.name != "plain"], ids=lambda x: str(x.name))
@given(which=st.integers(0, 99), rows=st.integers(1, 40), columns=st.integers(1, 40), share=st.floats(0, 1.1),
       seed=st.integers(0, 99))  # fmt: skip
def test_limit_is_kept(
    layout: Layout, maker: str, which: int, rows: int, columns: int, share: float, seed: int
) -> None:
    held = held_schemes(layout)
    check_budget(quantized(layout, held[which % len(held)], MAKERS[maker](32 * rows, 128 * columns)), share, seed)


@each_maker
@given(rows=st.integers(1, 40), columns=st.integers(1, 40), slices=st.integers(1, 5), as_columns=st.booleans(),
       share=st.floats(0, 1.1), seed=st.integers(0, 99))  # fmt: skip
def test_limit_is_kept_by_stacks_that_are_only_decoded(
    maker: str, rows: int, columns: int, slices: int, as_columns: bool, share: float, seed: int
) -> None:
    check_budget(kept(MAKERS[maker](8 * rows, 128 * columns), slices, as_columns), share, seed)


@each_maker
@pytest.mark.parametrize("layout", ["auto_round", "compressed-tensors"])
def test_block_of_a_large_matrix_costs_a_block(maker: str, layout: str) -> None:
    """Of 5 MB, as one of 200 tensors has, most is used, in few requests, but for what is less than a group more. In
    act-order all scales are read."""
    e = MAKERS[maker](8192, 28672)
    s = quantized(find_layout(layout), find_layout(layout).settle(Scheme("int4", 128, symmetric=True)), e)
    limit_bytes = (8 if maker == "act_order" else 5) * MB
    (check,) = plan_checks([s], limit_bytes, seed=1)
    group_bytes = cost_bytes(check) * 128 // (check.cut.end_column - check.cut.column)
    assert limit_bytes - group_bytes * s.is_strided - MB < cost_bytes(check) <= limit_bytes
    assert check.requests <= 2 + 2 * len(e.parts) + len(s.outputs)
    assert check.cut.end_row - check.cut.row >= 32
    assert check.cut.end_column - check.cut.column >= 128


def test_source_by_columns_is_read_by_whole_lines() -> None:
    """All rows of some columns, where the result keeps columns together, too."""
    layout, e = find_layout("gptq"), turned(4096, 8192)
    s = quantized(layout, layout.settle(Scheme("int4", 128, symmetric=True)), e)
    (check,) = plan_checks([s], 5 * MB, seed=1)
    assert (check.cut.row, check.cut.end_row) == (0, 4096)
    columns = check.cut.end_column - check.cut.column
    assert check.source_bytes == columns * 4096 * 2
    assert columns == 384


def test_what_an_encoded_magnitude_costs() -> None:
    for maker, bytes_of in {"fp8": 512 * 256 + 4 * 4 * 2, "turned": 2 * 512 * 256}.items():
        ref = TensorRef(WEIGHT, "s", "BF16", (512, 256), 0, 0, (MAKERS[maker](512, 256),))
        assert magnitude_bytes(ref) == bytes_of
