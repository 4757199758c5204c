"""Which packing auto-round's layout takes for a scheme, what it refuses, and what its configuration says of floats."""

import json
from typing import Final

import pytest

from shardq.layouts import LAYOUTS, default_layout, find_layout
from shardq.layouts.base import ModuleChoice
from shardq.schemes import PRESETS, Scheme, parse_scheme

LAYOUT: Final = find_layout("auto_round")
FLOATS: Final = ("MXFP4", "MXFP8", "MXFP4_RCEIL", "MXFP8_RCEIL", "MXINT4", "NVFP4_E5M3")
PACKINGS: Final = {
    "W4A16": "auto_round:auto_gptq",
    "W4A16_ASYM": "auto_round",
    "MXFP4": "auto_round:llm_compressor",
    "MXFP8": "auto_round:llm_compressor",
    "MXFP4_RCEIL": "auto_round:llm_compressor",
    "MXINT4": "auto_round",
    "NVFP4_E5M3": "auto_round:llm_compressor_nvfp4_e5m3",
}


def settled(name: str) -> Scheme:
    return LAYOUT.settle(parse_scheme(name).scheme)


@pytest.mark.parametrize(("name", "word"), PACKINGS.items())
def test_the_packing_of_a_scheme(name: str, word: str) -> None:
    scheme = settled(name)
    block = LAYOUT.config_block(scheme, [ModuleChoice("model.layers.0.mlp.up_proj", "linear", scheme)], "0.0")
    assert block["packing_format"] == word
    takers = [x.name for x in LAYOUTS if x.name.startswith("auto_round:") and not x.refuse(scheme, scheme, 256, 256)]
    assert (word in takers) == (word in {x.name for x in LAYOUTS} - {"auto_round"})


@pytest.mark.parametrize("default", FLOATS)
def test_a_loader_believes_of_floats_what_was_decided(default: str) -> None:
    scheme = settled(default)
    beside = [s for s in map(settled, FLOATS) if LAYOUT.refuse(s, scheme, 256, 256) is None]
    choices = [ModuleChoice(f"model.layers.{i}.mlp.up_proj", "linear", s) for i, s in enumerate((None, *beside))]
    block = json.loads(json.dumps(LAYOUT.config_block(scheme, choices, "0.0"), allow_nan=False))
    assert {c.module: LAYOUT.scheme_of(block, c.module) for c in choices} == {c.module: c.scheme for c in choices}
    kept = block["extra_config"]["model.layers.0.mlp.up_proj"]
    assert kept == {"bits": 16, "data_type": "float", "act_bits": 16, "act_data_type": "float"}


def test_one_configuration_has_one_packing() -> None:
    mx, other = settled("MXFP4"), settled("MXFP8")
    assert LAYOUT.refuse(other, mx, 256, 256) is None
    for name in ("W4A16", "MXINT4", "NVFP4_E5M3"):
        refusal = LAYOUT.refuse(settled(name), mx, 256, 256)
        assert refusal is not None
        assert not refusal.ragged
        assert "mix" in refusal.reason


@pytest.mark.parametrize("name", ["MXFP4A16", "MXFP6A16", "NVFP4A16", "FP8_DYNAMIC", "W8A8", "W4A8"])
def test_schemes_that_no_reader_of_it_has(name: str) -> None:
    refusal = LAYOUT.refuse(settled(name), settled(name), 256, 256)
    assert refusal is not None
    assert "has no packing" in refusal.reason


def test_exponents_are_rounded_as_the_layouts_own_library_does() -> None:
    scheme = parse_scheme("MXFP4").scheme
    rules = {x.name: x.settle(scheme).exponent for x in LAYOUTS if x.name in ("auto_round", "compressed-tensors")}
    assert rules == {"auto_round": "floor", "compressed-tensors": "even"}


def test_a_scheme_that_names_no_layout_gets_one_that_holds_it() -> None:
    for preset in PRESETS.values():
        layout = find_layout(default_layout(preset.scheme))
        scheme = layout.settle(preset.scheme)
        assert layout.refuse(scheme, scheme, 256, 256) is None, preset.name
