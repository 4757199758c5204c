import pytest

from shardq.errors import BadGroupSize, BadOption, UnknownScheme
from shardq.schemes import ALIASES, PRESETS, WHOLE_ROW, Scheme, change_scheme, parse_name, parse_scheme


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
        assert parse_scheme(alias) is PRESETS[name]
        assert alias not in PRESETS


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


@pytest.mark.parametrize("bits", [1, 5, 16])
def test_widths_that_no_loader_reads(bits: int) -> None:
    with pytest.raises(BadOption, match="2, 3, 4, 8"):
        change_scheme(PRESETS["W4A16"].scheme, bits=bits)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", [WHOLE_ROW, 32, 128, 48])
@pytest.mark.parametrize("symmetric", [True, False])
def test_names_can_be_read_back(bits: int, group: int, symmetric: bool) -> None:
    scheme = Scheme(f"int{bits}", group, symmetric)
    assert parse_name(scheme.name) == scheme


def test_groups_of_a_row() -> None:
    scheme = Scheme("int4", 128, symmetric=True)
    assert [scheme.groups(c) for c in (64, 128, 129, 256)] == [1, 1, 2, 2]
    assert Scheme("int4", WHOLE_ROW, symmetric=True).groups(1000) == 1
