from dataclasses import replace

import pytest

from shardq.errors import BadGroupSize, BadOption, UnknownScheme
from shardq.schemes import (
    ACTIVATIONS,
    ALIASES,
    PRESETS,
    WHOLE_ROW,
    WIDTHS,
    Scheme,
    change_scheme,
    parse_name,
    parse_scheme,
)


def test_names_of_presets_lead_back_to_them() -> None:
    plain = [p for p in PRESETS.values() if not p.bits_of]
    for name, preset in PRESETS.items():
        assert preset.name == name
        assert parse_scheme(name) is preset
    assert len({p.scheme.name for p in plain}) == len(plain)
    for preset in plain:
        assert parse_name(preset.scheme.name) == preset.scheme


def test_aliases_name_presets_and_hide_none() -> None:
    for alias, name in ALIASES.items():
        assert parse_scheme(alias) == parse_scheme(name)
        assert alias not in PRESETS


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("W4A16-G128", "W4A16"), ("w6a16_g64_asym", "W6A16G64-ASYM"), ("W3A16CH", "W3A16CH"), ("W8A16_SYM", "W8A16"),
        ("4bit", "W4A16G64"), ("FP8-Dynamic", "FP8"), ("FP8-BLOCK", "FP8-BLOCK"), ("nvfp4", "NVFP4"),
        ("mxfp4", "MXFP4"), ("INT8", "W8A8CH"), ("INT4", "W4A4CH"), ("W4A8", "W4A8"), ("W4AFP8", "W4AFP8"),
        ("W5A8G64", "W5A8G64"), ("MXFP4xFP8", "MXFP4XFP8"), ("W4A16_ASYM", "W4A16-ASYM"),
    ],
)  # fmt: skip
def test_words_of_other_tools(text: str, name: str) -> None:
    scheme = parse_scheme(text).scheme
    assert scheme.name == name
    assert parse_name(name) == scheme


@pytest.mark.parametrize("text", ["W8A4", "W4A8_ASYM", "W9A16", "W1A16", "W4A16G", "W4A16G0x", "NVFP5"])
def test_names_that_spell_out_nothing(text: str) -> None:
    with pytest.raises(UnknownScheme, match="did you mean"):
        parse_scheme(text)


@pytest.mark.parametrize(
    ("text", "name", "beside"),
    [
        ("FP8_STATIC", "FP8-STATIC", "FP8_DYNAMIC"), ("fp8-static-tensor", "FP8-STATIC-TENSOR", "FP8_TENSOR"),
        ("W8A8-static", "W8A8CH-STATIC", "W8A8"), ("INT8_STATIC", "W8A8CH-STATIC", "INT8"),
        ("NVFP4", "NVFP4", "NVFP4A16"),
    ],
)  # fmt: skip
def test_static_activations_change_no_weight(text: str, name: str, beside: str) -> None:
    scheme = parse_scheme(text).scheme
    assert scheme.name == name
    assert parse_name(name) == scheme
    assert ACTIVATIONS[scheme.activation].calibrated
    assert replace(scheme, activation="") == replace(parse_scheme(beside).scheme, activation="")


def test_static_activations_that_nobody_offers() -> None:
    with pytest.raises(UnknownScheme, match=r"W8A8_STATIC, FP8_STATIC.*or take W4A8,"):
        parse_scheme("W4A8_STATIC")


def test_names_of_activations_other_than_the_weights() -> None:
    mx = PRESETS["MXFP4"].scheme
    names = [replace(mx, activation=a).name for a in ("", "mxfp4", "mxfp4-rceil", "mxfp8", "fp8-g128")]
    assert names == ["MXFP4A16", "MXFP4", "MXFP4-RCEIL", "MXFP4A8", "MXFP4XFP8"]


@pytest.mark.parametrize("name", ["W8A8", "FP8_DYNAMIC", "MXFP4"])
def test_only_weight_only_integers_can_be_changed(name: str) -> None:
    with pytest.raises(BadOption, match="W4A16"):
        change_scheme(PRESETS[name].scheme, group_size=64)


@pytest.mark.parametrize("text", ["w4a16", " W4A16 ", "W4A16"])
def test_parse_ignores_case_and_space(text: str) -> None:
    assert parse_scheme(text).scheme == Scheme("int4", 128, symmetric=True)


def test_unknown_scheme_names_the_nearest() -> None:
    with pytest.raises(UnknownScheme, match=r"did you mean .*W4A16"):
        parse_scheme("W4A17")


def test_mixed_is_eight_bits_with_four_for_experts() -> None:
    preset = parse_scheme("w4a16-mixed")
    assert preset.scheme.bits == 8
    assert [b for _, b in preset.bits_of] == [4]


@pytest.mark.parametrize("group", [0, -2, -128])
def test_impossible_group_size(group: int) -> None:
    with pytest.raises(BadGroupSize, match=str(group)):
        change_scheme(PRESETS["W4A16"].scheme, group_size=group)


@pytest.mark.parametrize("bits", [1, 9, 16])
def test_widths_that_no_loader_reads(bits: int) -> None:
    with pytest.raises(BadOption, match="2, 3, 4, 5, 6, 7, 8"):
        change_scheme(PRESETS["W4A16"].scheme, bits=bits)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("group", [WHOLE_ROW, 32, 128, 48])
@pytest.mark.parametrize("symmetric", [True, False])
def test_names_can_be_read_back(bits: int, group: int, symmetric: bool) -> None:
    scheme = Scheme(f"int{bits}", group, symmetric)
    assert parse_name(scheme.name) == scheme


def test_groups_of_a_row() -> None:
    scheme = Scheme("int4", 128, symmetric=True)
    assert [scheme.groups(c) for c in (64, 128, 129, 256)] == [1, 1, 2, 2]
    assert Scheme("int4", WHOLE_ROW, symmetric=True).groups(1000) == 1
