"""What awq and fp8 refuse, and how their configurations name what stays in source precision."""

import json
import re
from dataclasses import replace
from typing import Final

import pytest

from shardq.errors import LayoutRefuses
from shardq.layouts import find_layout
from shardq.layouts.base import Layout, ModuleChoice
from shardq.schemes import PRESETS, WHOLE_ROW, Scheme

AWQ: Final = find_layout("awq")
FP8: Final = find_layout("fp8")
W4: Final = AWQ.settle(Scheme("int4", 128, symmetric=True))
BLOCK: Final = FP8.settle(PRESETS["FP8_BLOCK"].scheme)
MXFP8: Final = FP8.settle(PRESETS["MXFP8"].scheme)


def choices(scheme: Scheme, *kept: str) -> list[ModuleChoice]:
    body = [ModuleChoice(f"model.layers.1.mlp.{m}", "linear", scheme) for m in ("gate_proj", "up_proj", "down_proj")]
    return [*body, *(ModuleChoice(m, "router", None) for m in kept)]


# --- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n, p in PRESETS.items() if p.scheme.element != "int4"])
def test_awq_refuses_all_but_four_bits(name: str) -> None:
    scheme = AWQ.settle(PRESETS[name].scheme)
    refusal = AWQ.refuse(scheme, scheme, 128, 1024)
    assert refusal is not None
    assert not refusal.ragged
    assert "4-bit" in refusal.reason


@pytest.mark.parametrize(("group", "held"), [(WHOLE_ROW, True), *((g, True) for g in (32, 64, 128)), (16, False)])
def test_awq_refuses_groups_that_vllm_has_no_kernel_for(group: int, held: bool) -> None:
    scheme = AWQ.settle(Scheme("int4", group, symmetric=False))
    refusal = AWQ.refuse(scheme, scheme, 128, 1024)
    assert (refusal is None) == held
    assert refusal is None or str(group) in refusal.reason


def test_awq_refuses_rows_that_do_not_fill_words() -> None:
    assert AWQ.refuse(W4, W4, 8, 128) is None
    refusal = AWQ.refuse(W4, W4, 100, 128)
    assert refusal is not None
    assert not refusal.ragged


@pytest.mark.parametrize("other", [replace(W4, group_size=64), replace(W4, symmetric=False)])
def test_awq_has_one_scheme(other: Scheme) -> None:
    refusal = AWQ.refuse(other, W4, 128, 128)
    assert refusal is not None
    assert other.name in refusal.reason


@pytest.mark.parametrize("name", [n for n in PRESETS if n not in ("FP8_BLOCK", "MXFP8")])
def test_fp8_refuses_what_its_methods_do_not_say(name: str) -> None:
    scheme = FP8.settle(PRESETS[name].scheme)
    refusal = FP8.refuse(scheme, scheme, 128, 128)
    assert refusal is not None
    assert PRESETS[name].scheme.name in refusal.reason


def test_fp8_takes_blocks_of_any_shape_and_one_scheme() -> None:
    assert FP8.refuse(BLOCK, BLOCK, 1, 1) is None
    assert FP8.refuse(BLOCK, BLOCK, 200, 129) is None
    assert FP8.refuse(MXFP8, MXFP8, 3, 96) is None
    assert FP8.refuse(MXFP8, MXFP8, 32, 100) is not None
    assert FP8.refuse(MXFP8, BLOCK, 128, 128) is not None
    assert [s.shape for s in FP8.outputs(BLOCK, "BF16", 200, 129)] == [(200, 129), (2, 2)]


# --- kept modules --------------------------------------------------------------------------------------------------


def vllm_substring(module: str, entries: list[str]) -> bool:
    """vLLM 0.32, is_layer_skipped with match_mode="substring"."""
    return any(e in module for e in entries)


def transformers_keeps(module: str, entries: list[str]) -> bool:
    """transformers 5.23, should_convert_module."""
    boundary = r"(?:(?<=\.)|(?=\.|$))"
    return any(re.match(rf"(?:{e}){boundary}", module) or module.endswith(e) for e in entries)


def test_a_name_within_another_is_refused_where_readers_look_for_parts() -> None:
    clash = "model.layers.1.mlp.gate"  # gate_proj is quantized
    for layout, scheme in ((AWQ, W4), (FP8, MXFP8)):
        with pytest.raises(LayoutRefuses, match=r"cannot keep model\.layers\.1\.mlp\.gate beside .*gate_proj"):
            layout.config_block(scheme, choices(scheme, clash), "0")
    block = FP8.config_block(BLOCK, choices(BLOCK, clash), "0")
    assert FP8.scheme_of(block, "model.layers.1.mlp.gate_proj") == BLOCK
    assert FP8.scheme_of(block, clash) is None
    assert not transformers_keeps("model.layers.1.mlp.gate_proj", block["modules_to_not_convert"])


@pytest.mark.parametrize("kept", ["mlp.down_proj", "model.layers.1", "up_proj", "model.layers.[0-9].mlp.up_proj"])
def test_what_transformers_would_take_along_is_refused(kept: str) -> None:
    assert any(transformers_keeps(c.module, [kept]) for c in choices(BLOCK))
    with pytest.raises(LayoutRefuses, match="beside model"):
        FP8.config_block(BLOCK, choices(BLOCK, kept), "0")


@pytest.mark.parametrize(("layout", "scheme"), [(AWQ, W4), (FP8, BLOCK), (FP8, MXFP8)], ids=["awq", "fp8", "mxfp8"])
def test_readers_keep_what_is_kept_and_nothing_else(layout: Layout, scheme: Scheme) -> None:
    kept = ["model.layers.1.mlp.router", "model.layers.11.mlp.gate", "lm_head", "visual.blocks.0.attn.qkv", "a+b.c"]
    modules = choices(scheme, *kept)
    block = json.loads(json.dumps(layout.config_block(scheme, modules, "0")))
    entries = block["modules_to_not_convert"]
    assert entries == kept  # full names, as in the checkpoint
    for c in modules:
        assert vllm_substring(c.module, entries) == transformers_keeps(c.module, entries) == (c.scheme is None)


def test_a_head_without_a_tensor_is_kept() -> None:
    """A tied head is a Linear of the model, and transformers would look for its scales."""
    for layout, scheme in ((AWQ, W4), (FP8, BLOCK), (FP8, MXFP8)):
        block = layout.config_block(scheme, choices(scheme), "0")
        assert block["modules_to_not_convert"] == ["lm_head"]
        assert layout.scheme_of(block, "lm_head") is None
        head = ModuleChoice("lm_head", "head", scheme)
        block = layout.config_block(scheme, [*choices(scheme), head], "0")
        assert block["modules_to_not_convert"] == []
        assert layout.scheme_of(block, "lm_head") == scheme


def test_vllm_finds_the_list_of_mxfp8_under_its_own_name() -> None:
    block = FP8.config_block(MXFP8, choices(MXFP8, "model.layers.0.mlp.router"), "0")
    assert block["ignored_layers"] == block["modules_to_not_convert"] == ["model.layers.0.mlp.router", "lm_head"]
    assert (block["quant_method"], block["weight_block_size"], block["scale_fmt"]) == ("mxfp8", [1, 32], "ue8m0")
    block = FP8.config_block(BLOCK, choices(BLOCK), "0")
    assert (block["quant_method"], block["weight_block_size"]) == ("fp8", [128, 128])
    assert "scale_fmt" not in block


def test_awq_says_that_there_are_zero_points_always() -> None:
    for symmetric in (True, False):
        scheme = replace(W4, symmetric=symmetric)
        block = AWQ.config_block(scheme, choices(scheme), "1.2.3")
        assert (block["bits"], block["group_size"], block["zero_point"], block["version"]) == (4, 128, True, "gemm")
        assert block["meta"]["quantizer"] == ["shardq:1.2.3"]
        assert "sym" not in block  # GPTQModel would take it for the opposite of zero_point
