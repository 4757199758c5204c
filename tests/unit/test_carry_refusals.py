"""A conversion is refused only where no bits of the target are exact."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

import numpy as np
from carry_sources import (
    MODULE,
    Source,
    carried,
    convert,
    open_source,
    pack,
    same,
    settled,
    values,
    written,
)
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from shardq.carry import (
    fits,
    goal,
    target_scheme,
)
from shardq.carry_codes import carry_rows
from shardq.dequantize.values import byte_values
from shardq.errors import NotExact
from shardq.kernels import load
from shardq.layouts import find_layout
from shardq.layouts.stored import load as load_floats
from shardq.layouts.stored import store
from shardq.quantizers.decode import decode_rows as decode_quantized
from shardq.quantizers.quantized import Quantized
from shardq.schemes import parse_scheme

FLOAT_TYPES: Final = {"F16": np.float16, "BF16": np.uint16, "F32": np.float32}


def near(value: np.float32, dtype: str, steps: int = 3) -> list[np.float32]:
    """The numbers of a type around a value."""
    kind = np.dtype(FLOAT_TYPES[dtype])
    pattern = store(np.array([value], np.float32), kind).view(np.uint32 if dtype == "F32" else np.uint16)[0]
    around = [int(pattern) + i for i in range(-steps, steps + 1)]
    top = 0xFFFFFFFF if dtype == "F32" else 0xFFFF
    bits = np.array([a for a in around if 0 <= a <= top], np.uint32 if dtype == "F32" else np.uint16)
    found = load_floats(bits.view(kind))
    return [f for f in found if np.isfinite(f)]


def int_pack(
    codes: NDArray[np.uint8], scales: NDArray[np.float32], zeros: NDArray[np.uint8] | None, dtype: str
) -> Source:
    bits_of = "W4A16_G32" if zeros is None else "W4A16_G32_ASYM"
    layout, scheme = settled("compressed-tensors", bits_of)
    q = Quantized(codes, scales, zeros)
    return written(layout, scheme, pack(layout, scheme, q, dtype), dtype, codes.shape)


all_codes: Final = np.tile(np.arange(16, dtype=np.uint8), (8, 2))  # one group of a row has every code
dtypes: Final = st.sampled_from(["F16", "BF16", "F32"])
patterns: Final = st.lists(st.integers(0, 2**32 - 1), min_size=8, max_size=8)


def scales_of(drawn: Sequence[int], dtype: str) -> NDArray[np.float32]:
    """Finite scales [8, 1] of a type, of any size that weights allow."""
    bits = np.array(drawn, np.uint32)
    wide = ((bits & np.uint32(0x807FFFFF)) | ((((bits >> 23) & 0xFF) % 40 + 100) << 23).astype(np.uint32)).view(
        np.float32
    )
    return load_floats(store(wide, np.dtype(FLOAT_TYPES[dtype])))[:, None]


@given(drawn=patterns, zeros=st.lists(st.integers(0, 15), min_size=8, max_size=8), source=dtypes, target=dtypes)
def test_a_bias_is_refused_only_where_none_is_exact(
    drawn: list[int], zeros: list[int], source: str, target: str
) -> None:
    scales, points = scales_of(drawn, source), np.array(zeros, np.uint8)[:, None]
    s = int_pack(all_codes, scales, points, source)
    layout = find_layout("mlx")
    scheme = layout.settle(s.scheme())
    to = goal(layout, scheme, target, 8, 32)
    levels = np.arange(16, dtype=np.float32)
    for row in range(8):
        scale, zero = scales[row, 0], np.float32(zeros[row])
        wanted = scale * (levels - zero)
        try:
            q = carry_rows(s.e, s.parts(row, row + 1), row, row + 1, to, load())
        except NotExact:
            with np.errstate(all="ignore"):
                ways = [
                    (a, b)
                    for a in near(scale, target)
                    for b in near(np.float32(-float(scale) * float(zero)), target)
                    if ((a * levels) + b == wanted).all()
                ]
            assert ways == []
            continue
        assert q.biases is not None
        assert same(decode_quantized(q, scheme, load()), s.decoded()[row : row + 1])
        assert load_floats(store(q.biases, np.dtype(FLOAT_TYPES[target]))).tobytes() == q.biases.tobytes()


@given(drawn=patterns, biases=patterns, exact=st.booleans(), source=dtypes)
def test_a_zero_point_is_refused_only_where_none_is_exact(
    drawn: list[int], biases: list[int], exact: bool, source: str
) -> None:
    layout, scheme = settled("mlx", "W4A16_G32")
    scales, offsets = scales_of(drawn, source), scales_of(biases, source)
    if exact:
        points = np.array(biases, np.uint32)[:, None] % 18
        offsets = load_floats(store(-scales * points.astype(np.float32), np.dtype(FLOAT_TYPES[source])))
    q = Quantized(all_codes, scales, None, offsets)
    s = written(layout, scheme, pack(layout, scheme, q, source), source, (8, 32))
    other = find_layout("compressed-tensors")
    target = other.settle(replace(s.scheme(), symmetric=False))
    to = goal(other, target, source, 8, 32)
    levels = np.arange(16, dtype=np.float32)
    for row in range(8):
        try:
            found = carry_rows(s.e, s.parts(row, row + 1), row, row + 1, to, load())
        except NotExact:
            wanted = (scales[row] * levels) + offsets[row]
            zs = np.arange(16, dtype=np.float32)
            ways = [(a, z) for a in near(scales[row, 0], source) for z in zs if (a * (levels - z) == wanted).all()]
            assert ways == []
            continue
        assert same(decode_quantized(found, target, load()), s.decoded()[row : row + 1])


@given(
    drawn=patterns, empty_rows=st.sets(st.integers(0, 31)), source=dtypes, target=dtypes,
    name=st.sampled_from(["gptq", "compressed-tensors"]),
)  # fmt: skip
def test_a_scale_is_refused_only_where_the_type_lacks_it(
    drawn: list[int], empty_rows: set[int], source: str, target: str, name: str
) -> None:
    scales, codes = scales_of(drawn, source), np.repeat(all_codes, 4, axis=0)
    codes[sorted(empty_rows)] = 8
    s = int_pack(codes, np.repeat(scales, 4, axis=0)[:32], None, source)
    layout = find_layout(name)
    scheme = layout.settle(s.scheme())
    to = goal(layout, scheme, target, 32, 32)
    kept = "F16" if name == "gptq" else target
    levels = np.arange(-8, 8, dtype=np.float32)
    for row in range(32):
        scale = scales[row // 4, 0]
        try:
            found = carry_rows(s.e, s.parts(row, row + 1), row, row + 1, to, load())
        except NotExact:
            assert row not in empty_rows
            assert [a for a in near(scale, kept) if (a * levels == scale * levels).all()] == []
            continue
        assert same(decode_quantized(found, scheme, load()), s.decoded()[row : row + 1])
        assert load_floats(store(found.scales, np.dtype(FLOAT_TYPES[kept]))).tobytes() == found.scales.tobytes()


def mxfp4(exponents: Sequence[int], empty_groups: set[int]) -> Source:
    layout, scheme = settled("compressed-tensors", "MXFP4A16")
    rng = np.random.default_rng(len(empty_groups))
    codes = rng.integers(1, 8, (8, 32), np.uint8) | (rng.integers(0, 2, (8, 32), np.uint8) << 3)
    codes[sorted(empty_groups)] = 8  # -0
    scales = np.ldexp(np.float32(1), np.array(exponents)).astype(np.float32)[:, None]
    return written(layout, scheme, pack(layout, scheme, Quantized(codes, scales, None), "BF16"), "BF16", (8, 32))


@given(
    low=st.integers(-127, 120), spread=st.integers(0, 22), data=st.data(), empty_groups=st.sets(st.integers(0, 7)),
    tile=st.sampled_from([1, 3, 8]),
)  # fmt: skip
def test_powers_of_two_go_below_a_global_scale_if_e4m3_spans_them(
    low: int, spread: int, data: st.DataObject, empty_groups: set[int], tile: int
) -> None:
    high = min(low + spread, 124)
    exponents = data.draw(st.lists(st.integers(low, high), min_size=8, max_size=8))
    s = mxfp4(exponents, empty_groups)
    layout, scheme = settled("compressed-tensors", "NVFP4A16")
    assert fits(s.e, s.scheme(), scheme, layout) is None
    full = [x for i, x in enumerate(exponents) if i not in empty_groups]
    try:
        arrays = carried(s, layout, scheme, "BF16", tile)
    except NotExact:
        # Readers divide by a finite fp32 number: the smallest powers of two cannot be lifted to the top.
        top = min(8 - max(full), 127)
        assert min(full) < -9 - top
        assert max(full) - min(full) > 17 or top == 127
        return
    assert same(values(layout, scheme, arrays), s.decoded())
    if full:
        assert max(full) - min(full) <= 17


@given(power=st.booleans(), factor=st.floats(2.0**-20, 1.0, width=32), seed=st.integers(0, 99))
def test_a_factor_becomes_a_divisor_or_no_divisor_gives_all_scales(power: bool, factor: float, seed: int) -> None:
    f = np.float32(2.0 ** np.floor(np.log2(factor))) if power else np.float32(factor)
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 256, (8, 256), np.uint8)
    stored = rng.permutation(np.resize(np.arange(1, 0x7F, dtype=np.uint8), 256)).reshape(8, 32)
    tensors = {
        f"{MODULE}.weight": ("U8", codes.shape, codes.tobytes()),
        f"{MODULE}.weight_scale": ("F8_E4M3", stored.shape, stored.tobytes()),
        f"{MODULE}.weight_scale_2": ("F32", (), f.tobytes()),
    }
    s = open_source(tensors, {})
    assert s.scheme() == parse_scheme("NVFP4A16").scheme
    layout, scheme = settled("compressed-tensors", "NVFP4A16")
    table = byte_values("e4m3fn")[1:0x7F]
    try:
        arrays = carried(s, layout, scheme, "BF16", tile=3)
    except NotExact:
        assert not power
        ways = near(np.float32(1) / f, "F32", steps=8)
        assert [g for g in ways if (table / g == table * f).all()] == []
        return
    assert same(values(layout, scheme, arrays), s.decoded())


@given(exponent=st.integers(-6, 6), mantissa=st.sampled_from([1.0, 1.0, 1.5, 1.1]), seed=st.integers(0, 99))
def test_a_divisor_goes_away_where_e4m3_has_the_quotients(exponent: int, mantissa: float, seed: int) -> None:
    layout, scheme = settled("compressed-tensors", "NVFP4A16")
    rng = np.random.default_rng(seed)
    codes = rng.integers(1, 8, (8, 64), np.uint8)
    scales = byte_values("e4m3fn")[rng.integers(0x20, 0x50, (8, 4))]
    g = float(np.float32(np.ldexp(mantissa, exponent)))
    q = Quantized(codes, scales, None, global_scale=g)
    s = written(layout, scheme, pack(layout, scheme, q, "BF16"), "BF16", (8, 64))
    mlx = find_layout("mlx")
    target = target_scheme(s.e, s.scheme(), mlx)
    assert target is not None
    quotients = scales / np.float32(g)
    try:
        arrays = carried(s, mlx, target, "BF16")
    except NotExact:
        assert not np.isin(quotients, byte_values("e4m3fn")).all()
        return
    assert same(values(mlx, target, arrays), s.decoded())
    there = written(mlx, target, arrays, "BF16", (8, 64))
    back = convert(there, layout)
    assert same(back.decoded(), s.decoded())
