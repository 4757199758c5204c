"""Codes carried from one layout to another are the same numbers; what is refused has no other way."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

import numpy as np
import pytest
from carry_sources import (
    COLUMNS,
    FAMILY,
    MODULE,
    ROWS,
    Source,
    carried,
    convert,
    golden,
    open_source,
    pack,
    quantized,
    same,
    settled,
    values,
    written,
)
from numpy.typing import NDArray

from shardq.carry import (
    Goal,
    carried_dtype,
    carried_scheme,
    fits,
    goal,
    is_certain,
    no_scheme,
    shared_rows,
    target_scheme,
)
from shardq.dequantize.hints import Hints
from shardq.errors import NonFiniteWeight, NotExact
from shardq.kernels import load
from shardq.layouts import LAYOUTS, find_layout
from shardq.layouts.base import Layout, unit_rows
from shardq.quantizers.quantized import Quantized
from shardq.schemes import PRESETS, Scheme, parse_scheme

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
