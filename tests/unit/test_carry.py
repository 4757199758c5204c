"""Codes carried from one layout to another are the same numbers; what is refused has no other way."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from shardq.arena import Arena, reserve
from shardq.carry import (
    Goal,
    carried_dtype,
    carried_scheme,
    fits,
    goal,
    is_certain,
    needs_largest,
    no_scheme,
    shared_rows,
    target_scheme,
)
from shardq.carry_codes import carry_rows, largest_scale
from shardq.checkpoint import TensorRef
from shardq.dequantize import Encoded, Part, find_encoded
from shardq.dequantize.decoding import Ranges, decode_rows, read_parts
from shardq.dequantize.hints import Hints, read_hints
from shardq.dequantize.values import byte_values
from shardq.errors import NonFiniteWeight, NotExact
from shardq.kernels import load
from shardq.layouts import LAYOUTS, find_layout
from shardq.layouts.base import Layout, ModuleChoice, unit_rows
from shardq.layouts.stored import load as load_floats
from shardq.layouts.stored import store
from shardq.quantizers.buffers import buffer_shapes, take_buffers
from shardq.quantizers.decode import decode_rows as decode_quantized
from shardq.quantizers.quantized import Quantized
from shardq.quantizers.rtn import quantize_rows
from shardq.schemes import PRESETS, Scheme, parse_scheme
from shardq.worker import TARGET_ARRAYS, write_values

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
        raw, dtype, scheme, take_buffers(arena, ROWS, COLUMNS, scheme), np.empty((ROWS, 3)), load(), amax
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


# --- every pair ----------------------------------------------------------------------------------------------------

INTEGERS: Final = ("W4A16", "W4A16_G64", "W4A16_G64_ASYM", "W4A16_CH", "W8A16_G64", "W8A16_CH", "W3A16_G32_ASYM")
NAMES: Final = (*INTEGERS, "W8A8", "FP8_DYNAMIC", "FPW8A16_TENSOR", "FP8_BLOCK", "MXFP8", "MXFP4A16", "MXFP6A16",
                "MXINT4", "NVFP4A16")  # fmt: skip


def sources() -> list[tuple[Layout, Scheme]]:
    pairs = []
    for layout in LAYOUTS:
        schemes = dict.fromkeys(layout.settle(parse_scheme(n).scheme) for n in (*NAMES, "MXFP4"))
        pairs += [(layout, s) for s in schemes if layout.refuse(s, s, ROWS, COLUMNS) is None and layout.name != "fake"]
    return pairs


@pytest.mark.parametrize(("layout", "scheme"), sources(), ids=[f"{x.name}-{s.name}" for x, s in sources()])
def test_what_fits_is_carried_to_the_bit(layout: Layout, scheme: Scheme) -> None:
    s = quantized(layout, scheme)
    fresh_affine = layout.name == "mlx" and scheme.format.is_integer  # biases that are no multiples of scales
    own = s.scheme()
    assert (own.element, own.bits) == (scheme.element, scheme.bits)
    held = set()
    for other in LAYOUTS:
        target = target_scheme(s.e, own, other)
        if target is None:
            if other.name != "fake":
                assert fits(s.e, own, other.settle(own), other)
            continue
        held.add(other.name)
        dtype = carried_dtype(s.e, own, target, other)
        to = goal(other, target, dtype, ROWS, COLUMNS)
        try:
            arrays = carried(s, other, target, dtype, unit_rows(other, target))
        except NotExact:
            loses_global = s.e.part("divisor") is not None and not to.lifted
            assert fresh_affine or loses_global, other.name
            assert not is_certain(s.e, own, to)
            continue
        assert same(values(other, target, arrays), s.decoded()), other.name
    assert layout.name in held
    if scheme.bits == 4 and scheme.group_size == 64:
        assert held >= set(FAMILY) - (set() if own.symmetric else {"auto_round:auto_gptq"})


@pytest.mark.parametrize(("layout", "scheme"), sources(), ids=[f"{x.name}-{s.name}" for x, s in sources()])
def test_into_its_own_layout_a_source_goes_byte_for_byte(layout: Layout, scheme: Scheme) -> None:
    s = quantized(layout, scheme)
    own = s.scheme()
    target = target_scheme(s.e, own, layout)
    assert target == scheme
    to = goal(layout, target, carried_dtype(s.e, own, target, layout), ROWS, COLUMNS)
    assert is_certain(s.e, own, to)
    arrays = carried(s, layout, target, "F16", unit_rows(layout, target))
    assert b"".join(arrays[x.suffix].tobytes() for x in layout.outputs(target, "F16", ROWS, COLUMNS)) == s.content


@pytest.mark.parametrize("group", [64, 128])
def test_the_chain_of_layouts_ends_where_it_began(group: int) -> None:
    layout, scheme = settled("gptq", "W4A16", group_size=group)
    rng, shape = np.random.default_rng(group), (64, 512)
    codes = rng.integers(0, 16, shape, np.uint8)
    scales = rng.uniform(-0.02, 0.02, (64, 512 // group)).astype(np.float16).astype(np.float32)
    first = written(layout, scheme, pack(layout, scheme, Quantized(codes, scales, None), "F16"), "F16", shape)
    s = first
    for name in ("awq", "compressed-tensors", "mlx"):
        s = convert(s, find_layout(name), symmetric=True)
    last = convert(s, layout, symmetric=True)
    assert last.content == first.content
    read = layout.unpack(carried(last, layout, scheme, "F16"), scheme, load())
    assert np.array_equal(read.codes, codes)
    assert np.array_equal(read.scales, scales)


def test_zero_points_go_round_by_way_of_wide_biases() -> None:
    layout, scheme = settled("gptq", "W4A16_G64_ASYM")
    first = quantized(layout, scheme)
    s = first
    for name in ("awq", "compressed-tensors", "mlx", "auto_round", "auto_round:auto_awq"):
        s = convert(s, find_layout(name))
        stored = s.e.part("biases")
        assert stored is None or stored.dtype == "F32"  # a scale times a zero point has up to 15 bits
    assert convert(s, layout).content == first.content
    target = find_layout("mlx").settle(first.scheme())
    with pytest.raises(NotExact, match=r"row \d+, group \d+ has scale .* and zero point .* --requantize"):
        carried(first, find_layout("mlx"), target, "F16")


# --- sources of others ---------------------------------------------------------------------------------------------


def test_four_bit_floats_of_deepseek_v4_are_mxfp4_as_they_are() -> None:
    s = golden("mxfp4_v4/int8")
    layout, scheme = settled("compressed-tensors", "MXFP4A16")
    assert s.scheme() == parse_scheme("MXFP4A16").scheme
    assert is_certain(s.e, s.scheme(), goal(layout, scheme, "BF16", s.e.rows, s.e.columns))
    arrays = carried(s, layout, scheme, "BF16")
    assert {arrays["weight_packed"].tobytes(), arrays["weight_scale"].tobytes()} == {
        s.content[p.begin : p.begin + p.lines * p.width] for p in s.e.parts
    }


def test_interleaved_rows_of_gpt_oss_are_carried() -> None:
    s = golden("mxfp4_gptoss/stack")
    layout, scheme = settled("compressed-tensors", "MXFP4A16")
    for start in (0, 1):
        half = replace(s, e=s.e.picked(start, s.e.rows, 2))
        arrays = carried(half, layout, scheme, "BF16", tile=8)
        assert same(values(layout, scheme, arrays), s.decoded()[start::2])


@pytest.mark.parametrize("case", ["fp8_block_ue8m0/even", "fp8_block_ue8m0/ragged", "fp8_v4/even"])
@pytest.mark.parametrize("name", ["mlx", "compressed-tensors"])
def test_blocks_of_powers_of_two_become_mxfp8(case: str, name: str) -> None:
    s = golden(case)
    layout, scheme = settled(name, "MXFP8A16" if name == "compressed-tensors" else "MXFP8")
    assert s.scheme().scale == "e8m0"
    reason = fits(s.e, s.scheme(), scheme, layout)
    if s.e.columns % 32 or (s.e.block[1] % 32 and s.e.block[1] < s.e.columns):
        assert reason
        return
    assert reason is None
    assert same(values(layout, scheme, carried(s, layout, scheme, "BF16", tile=32)), s.decoded())


def fp8_blocks(scales: NDArray[np.float32], columns: int = 320, **config: Any) -> Source:
    rng = np.random.default_rng(3)
    codes = rng.integers(0, 0x7E, (160, columns), np.uint8)
    block = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128], **config}
    tensors = {
        f"{MODULE}.weight": ("F8_E4M3", codes.shape, codes.tobytes()),
        f"{MODULE}.weight_scale_inv": ("F32", scales.shape, scales.tobytes()),
    }
    return open_source(tensors, {"quantization_config": block})


def test_blocks_of_plain_scales_become_mxfp8_where_they_are_said_to_be_powers_of_two() -> None:
    scales = np.ldexp(np.float32(1), np.array([[-3, -9, 0], [-20, 2, 1]])).astype(np.float32)
    layout, scheme = settled("fp8", "MXFP8")
    plain, said = fp8_blocks(scales), fp8_blocks(scales, scale_fmt="ue8m0")
    assert plain.scheme() == parse_scheme("FP8_BLOCK").scheme
    assert "no powers of two" in str(fits(plain.e, plain.scheme(), scheme, layout))
    assert fits(said.e, said.scheme(), scheme, layout) is None
    arrays = carried(said, layout, scheme, "BF16", tile=32)
    assert same(values(layout, scheme, arrays), said.decoded())
    scales[1, 2] = 3
    lie = fp8_blocks(scales, scale_fmt="ue8m0")
    with pytest.raises(NotExact, match=r"q_proj.weight in shard \(fp8_block\).* row 128, group 8 has scale 3.0"):
        carried(lie, layout, scheme, "BF16", tile=32)
    back, own = find_layout("fp8"), said.scheme()
    assert target_scheme(said.e, own, back) == back.settle(parse_scheme("FP8_BLOCK").scheme)
    assert target_scheme(said.e, own, find_layout("mlx")) == find_layout("mlx").settle(scheme)


def test_blocks_of_numbers_go_to_another_layout_in_fp32() -> None:
    s = fp8_blocks(np.random.default_rng(1).uniform(1e-4, 1, (2, 3)).astype(np.float32))
    layout = find_layout("compressed-tensors")
    found = convert(s, layout)
    assert found.scheme().name == "FP8-BLOCK"
    scale = found.e.part("scale")
    assert scale is not None
    assert scale.dtype == "F32"
    with pytest.raises(NotExact, match="a number of bf16"):
        carried(s, layout, layout.settle(s.scheme()), "BF16")


def test_picked_rows_share_scales_by_fewer() -> None:
    s = fp8_blocks(np.ldexp(np.float32(1), np.array([[-3, -9, 0], [-20, 2, 1]])).astype(np.float32), scale_fmt="ue8m0")
    assert [shared_rows(e) for e in (s.e, s.e.picked(0, 160, 2), s.e.picked(64, 160), s.e.picked(0, 128))] == [
        128, 64, 64, 128,
    ]  # fmt: skip
    layout, scheme = settled("fp8", "FP8_BLOCK")
    odd = replace(s, e=s.e.picked(32, 160))
    assert "blocks of 128" in str(fits(odd.e, odd.scheme(), scheme, layout))
    layout, scheme = settled("fp8", "MXFP8")
    assert fits(odd.e, odd.scheme(), scheme, layout) is None
    assert same(values(layout, scheme, carried(odd, layout, scheme, "BF16", tile=64)), odd.decoded())


def test_what_has_no_scheme_says_why() -> None:
    for case, word in (("bnb4/nf4", "nf4"), ("bnb8/rows", "1/127")):
        s = golden(case)
        assert carried_scheme(s.e, s.hints) is None
        assert word in str(no_scheme(s.e, s.hints))
    s = fp8_blocks(np.ones((2, 3), np.float32))
    assert no_scheme(s.e.turned(), s.hints) == "is stored as columns"
    assert no_scheme(replace(s.e, element="e4m3fnuz"), s.hints)


def test_act_order_is_told_by_the_configuration_or_the_data() -> None:
    s = golden("gptq/v2_4bit_act_order")
    said = replace(s.hints, block={**s.hints.block, "desc_act": True})
    assert "act-order" in str(no_scheme(s.e, said))
    assert no_scheme(s.e, replace(said, block={**said.block, "static_groups": True})) is None
    layout = find_layout("awq")
    with pytest.raises(NotExact, match="columns are in another order"):
        carried(s, layout, layout.settle(s.scheme()), "F16")


@pytest.mark.parametrize(
    ("block", "expected"),
    [
        ({}, None),
        ({"sym": False}, False),
        ({"sym": True, "extra_config": {"m": {"sym": False}}}, False),
        ({"quant_method": "awq", "zero_point": True}, None),
        ({"quant_method": "awq", "zero_point": True, "meta": {"sym": True}}, True),
        ({"zero_point": False}, True),
        ({"config_groups": {"a": {"weights": {"symmetric": True}}, "b": {"weights": {"symmetric": True}}}}, True),
        ({"config_groups": {"a": {"weights": {"symmetric": True}}, "b": {"weights": {"symmetric": False}}}}, None),
    ],
)
def test_symmetry_is_as_the_source_says(block: Mapping[str, Any], expected: bool | None) -> None:
    assert Hints("", block, None).symmetric("m") is expected


def test_a_source_that_lies_about_its_symmetry_is_refused() -> None:
    layout, scheme = settled("gptq", "W4A16_G64_ASYM")
    s = quantized(layout, scheme)
    symmetric = layout.settle(replace(scheme, symmetric=True))
    assert "zero points" in str(fits(s.e, s.scheme(), symmetric, layout))
    assert fits(s.e, s.scheme(symmetric=True), symmetric, layout) is None
    with pytest.raises(NotExact, match=r"row \d+, group \d+ has zero point \d+, expected 8 in all"):
        carried(s, layout, symmetric, "F16")


def test_damaged_numbers_are_an_error_of_their_own() -> None:
    scales = np.ones((2, 3), np.float32)
    scales[1, 1] = np.nan
    s = fp8_blocks(scales)
    layout, scheme = settled("fp8", "FP8_BLOCK")
    with pytest.raises(NonFiniteWeight, match="row 128, group 1"):
        carried(s, layout, scheme, "BF16", tile=128)
    nan = replace(s, content=b"\x7f" + fp8_blocks(np.ones((2, 3), np.float32)).content[1:])
    with pytest.raises(NonFiniteWeight, match="row 0, group 0"):
        carried(nan, layout, scheme, "BF16")
    huge = fp8_blocks(np.full((2, 3), 3e38, np.float32))
    with pytest.raises(NonFiniteWeight):
        carried(huge, layout, scheme, "BF16")


@pytest.mark.parametrize(
    ("block", "name"),
    [
        ({"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}, "fp8-g128"),
        ({"quant_method": "fp8", "activation_scheme": "static"}, ""),
        ({"quant_method": "mxfp8"}, "mxfp8"),
        ({}, ""),
    ],
)
def test_activations_are_declared_as_in_the_source(block: Mapping[str, Any], name: str) -> None:
    s = fp8_blocks(np.ones((2, 3), np.float32))
    found = carried_scheme(s.e, Hints(str(block.get("quant_method", "")), block, None))
    assert found is not None
    assert found.activation == name


def test_own_schemes_are_presets_where_there_is_one() -> None:
    for layout, scheme in sources():
        own = quantized(layout, scheme).scheme()
        if not scheme.format.is_integer:
            assert own in [p.scheme for p in PRESETS.values()], (layout.name, scheme.name, own)


# --- refusals are right --------------------------------------------------------------------------------------------

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


def test_goals_are_equal_where_codes_are() -> None:
    """Outputs that want the same rows share them."""
    pairs = [settled(name, "W4A16") for name in ("gptq", "auto_round")]
    found = {replace(goal(x, s, "BF16", 64, 256), layout="") for x, s in pairs}
    assert found == {Goal(pairs[0][1], "", "fp16", biased=False, lifted=False)}


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("NVFP4A16", {"reach": "group"}),
        ("NVFP4A16", {"group_size": 32}),
        ("MXFP4A16", {"group_size": 64}),
        ("MXFP8A16", {"group_size": 128, "group_rows": 128}),
        ("W8A8", {"symmetric": False}),
        ("W4A8", {"symmetric": False}),
    ],
)
def test_formats_hold_what_their_names_stand_for_alone(name: str, changed: dict[str, Any]) -> None:
    """Presets cannot ask for these; sources can have them."""
    layout, scheme = settled("compressed-tensors", name, **changed)
    refusal = layout.refuse(scheme, scheme, 256, 256)
    assert refusal is not None
    assert "has no format" in refusal.reason
