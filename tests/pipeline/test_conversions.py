"""Codes that a source has are carried: into another layout, or as they are, and every weight decodes to what it was."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import encoded_sources as sources
import numpy as np
import pytest

import shardq
from shardq import Limits, convert_recipe, make_recipe
from shardq.errors import NotExact, NothingToQuantize
from shardq.ledger import LEDGER, decode_ledger

CASES: Mapping[str, Any] = sources.CASES
ONE = Limits(parallel=1)
# case, layouts that hold its numbers
CONVERSIONS = [
    ("gptq_v1", ("gptq", "gptq_v2", "awq", "auto_round", "compressed-tensors", "mlx")),
    ("gptq_v2", ("gptq_v2", "awq", "compressed-tensors")),
    ("awq", ("awq", "gptq_v2", "compressed-tensors", "auto_round")),
    ("int_pack", ("compressed-tensors", "mlx")),
    ("int_pack_zeros", ("compressed-tensors", "gptq_v2")),
    ("mxfp4_ct", ("compressed-tensors", "mlx")),
    ("mxfp4_v4", ("compressed-tensors", "mlx")),
    ("mxfp8", ("compressed-tensors", "mlx")),
    ("fp8_block", ("fp8", "compressed-tensors")),
    ("fp8_block_powers", ("fp8", "mlx")),
    ("fp8_block_ct", ("compressed-tensors",)),
    ("fp8_channel", ("compressed-tensors",)),
    ("int8_channel", ("compressed-tensors",)),
    ("nvfp4_ct", ("compressed-tensors",)),
    ("gpt_oss", ("compressed-tensors",)),
    ("qwen3_moe", ("compressed-tensors", "fp8")),
]


def decoded(folder: Path, out: Path) -> dict[str, tuple[tuple[int, ...], bytes]]:
    """All tensors in fp32, of what was quantized in particular."""
    shardq.quantize(folder, shardq.dequantize_recipe("F32"), output_dir=out, limits=ONE)
    return {n: (t.data.shape, t.data.tobytes()) for n, t in sources.read_tensors(out).items()}


def entries(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = decode_ledger((folder / LEDGER).read_bytes())["tensors"]
    return found


def packed(folder: Path) -> dict[str, bytes]:
    return {n: t.data.tobytes() for n, t in sources.read_tensors(folder).items()}


@pytest.mark.parametrize(("case", "layout"), [(c, layout) for c, layouts in CONVERSIONS for layout in layouts])
def test_converted_weights_decode_to_the_same_numbers(case: str, layout: str, tmp_path: Path) -> None:
    source = sources.write_source(CASES[case], tmp_path / "source")
    try:
        made = shardq.quantize(source, convert_recipe(layout), output_dir=tmp_path / "made", limits=ONE)
    except NotExact as e:
        pytest.fail(str(e))
    assert made.quantized > 0
    assert made.errors is not None
    assert made.errors.max_error == made.errors.figures.squared_error == 0
    assert all(e["carried"] for e in entries(tmp_path / "made").values() if e["outcome"] == "quantized")
    assert shardq.verify(tmp_path / "made").problems == ()
    if case != "gpt_oss":  # whose experts are stacks only before they are converted
        assert decoded(tmp_path / "made", tmp_path / "after") == decoded(source, tmp_path / "before")


def test_a_round_trip_gives_the_first_bytes(tmp_path: Path) -> None:
    """GPTQ -> AWQ -> compressed-tensors -> MLX -> GPTQ."""
    first = tmp_path / "gptq"
    shardq.quantize("demo", "W4A16@gptq", output_dir=first, limits=ONE)
    last = first
    for layout in ("awq", "compressed-tensors", "mlx", "gptq"):
        out = tmp_path / f"to-{layout}"
        result = shardq.quantize(last, convert_recipe(layout, symmetric=True), output_dir=out, limits=ONE)
        assert result.quantized == 45
        assert packed(out) != packed(last)
        last = out
    assert packed(last) == packed(first)


@pytest.mark.parametrize(
    ("case", "scheme"),
    [
        ("mxfp4_ct", "MXFP4A16"),
        ("mxfp4_v4", "MXFP4"),
        ("mxfp8", "MXFP8"),
        ("fp8_block", "FP8_BLOCK@fp8"),
        ("gptq_v2", "W4A16_ASYM@gptq_v2"),
        ("nvfp4_ct", "NVFP4A16"),
    ],
)
def test_what_has_the_wanted_scheme_is_passed_through(case: str, scheme: str, tmp_path: Path) -> None:
    """Its codes and scales are the source's own bytes."""
    source = sources.write_source(CASES[case], tmp_path / "source")
    group = 32 if scheme.startswith("W4") else None
    shardq.quantize(source, make_recipe(scheme, group_size=group), output_dir=tmp_path / "made", limits=ONE)
    assert all(e.get("carried") for e in entries(tmp_path / "made").values() if e["outcome"] == "quantized")
    there = set(packed(source).values())
    made = {n: data for n, data in packed(tmp_path / "made").items() if not n.endswith(("norm.weight", "g_idx"))}
    assert [n for n, data in made.items() if data not in there and "weight_global_scale" not in n] == []


@pytest.mark.parametrize(("case", "warned"), [("fp8_static_inv", True), ("fp8_channel", False)])
def test_scales_of_activations_that_stay_behind_are_told(case: str, warned: bool, tmp_path: Path) -> None:
    """What servers compute with the result is something else, although its weights are the same."""
    source = sources.write_source(CASES[case], tmp_path / "source")
    recipe = convert_recipe("compressed-tensors")
    planned = [w for w in shardq.plan(source, recipe).warnings if "activations" in w]
    made = shardq.quantize(source, recipe, output_dir=tmp_path / "made", limits=ONE)
    assert list(made.warnings) == planned
    assert len(planned) == warned
    assert not warned or ".activation_scale and 13 more" in planned[0]
    told = decode_ledger((tmp_path / "made" / LEDGER).read_bytes()).get("source", {})
    left = [e for e in told.values() if e["outcome"] == "dropped" and "activations" in e["reason"]]
    assert len(left) == (14 if warned else 0)
    assert shardq.plan(source, make_recipe("FP8_DYNAMIC@compressed-tensors")).warnings == ()  # which asks for others


def unshared(folder: Path) -> Path:
    """NVFP4 with another global scale in each module, one of which servers take for q, k and v, and for gate and up."""
    case, shared = CASES["nvfp4_ct"], sources.write_source(CASES["nvfp4_ct"], folder / "shared")
    tensors = sources.read_tensors(shared)
    above = [n for n in tensors if n.endswith(".weight_global_scale")]
    own = {n: sources.Stored("F32", np.full(1, 2000 + number, np.float32)) for number, n in enumerate(above)}
    source: Path = sources.write_tensors(folder / "own", tensors | own, lambda _: 1, case.config)
    return source


FUSED = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")


def test_global_scales_that_servers_would_mix_up_stop_a_conversion(tmp_path: Path) -> None:
    source = unshared(tmp_path)
    reason = (
        r"10 weights .*k_proj\.weight and 5 more: shares no global scale .*\(q_proj, k_proj, v_proj\).*--requantize"
    )
    with pytest.raises(NotExact, match=reason):
        shardq.plan(source, convert_recipe("compressed-tensors"))
    recipe = convert_recipe("compressed-tensors", requantize=True)
    plan = shardq.plan(source, recipe)
    made = {d.tensor.module.rpartition(".")[2] for d in plan.decisions if d.scheme and not d.carried}
    assert made == set(FUSED)


def test_global_scales_that_servers_would_mix_up_are_made_anew(tmp_path: Path) -> None:
    """A fused group gets one of its own, unless the engines that are meant run its members one by one."""
    source = unshared(tmp_path)
    shardq.quantize(source, make_recipe("NVFP4A16"), output_dir=tmp_path / "made", limits=ONE)
    carried = {n.split(".")[-2] for n, e in entries(tmp_path / "made").items() if e.get("carried")}
    assert carried
    assert not carried & set(FUSED)
    made = packed(tmp_path / "made")
    layer = "model.layers.0.self_attn"
    assert len({made[f"{layer}.{m}.weight_global_scale"] for m in FUSED[:3]}) == 1
    assert shardq.verify(tmp_path / "made", source=source).problems == ()
    apart = shardq.plan(source, make_recipe("NVFP4A16", split_fused=True))
    assert all(d.carried for d in apart.decisions if d.scheme)


def test_new_codes_are_made_where_that_is_wanted(tmp_path: Path) -> None:
    source = sources.write_source(CASES["fp8_block"], tmp_path / "source")
    recipe = make_recipe("FP8_BLOCK@fp8", requantize=True)
    shardq.quantize(source, recipe, output_dir=tmp_path / "made", limits=ONE)
    assert not any(e.get("carried") for e in entries(tmp_path / "made").values())


def test_what_cannot_be_carried_is_named_before_a_weight_is_read(tmp_path: Path) -> None:
    for case, layout, reason in (
        ("bnb4_nf4", "compressed-tensors", "codes of nf4"),
        ("gptq_act_order", "awq", "act-order"),
        ("fp8_channel", "gptq", "weight"),
    ):
        source = sources.write_source(CASES[case], tmp_path / case)
        with pytest.raises(NotExact, match=f"weights of .* cannot be carried: .*{reason}"):
            shardq.plan(source, convert_recipe(layout))


def test_data_that_do_not_fit_stop_the_run_and_name_the_row(tmp_path: Path) -> None:
    """A source that says it is symmetric and is not."""
    source = sources.write_source(CASES["awq"], tmp_path / "source")
    recipe = convert_recipe("gptq", symmetric=True)
    with pytest.raises(NotExact, match=r"cannot be carried to gptq .*row \d+, group \d+"):
        shardq.quantize(source, recipe, output_dir=tmp_path / "made", limits=ONE)
    assert not (tmp_path / "made" / "config.json").exists()


def test_requantize_makes_new_codes_only_of_what_may_not_fit(tmp_path: Path) -> None:
    source = sources.write_source(CASES["awq"], tmp_path / "source")
    recipe = convert_recipe("mlx", requantize=True)
    shardq.quantize(source, recipe, output_dir=tmp_path / "made", limits=ONE)
    found = [e for e in entries(tmp_path / "made").values() if e["outcome"] == "quantized"]
    assert found
    assert shardq.verify(tmp_path / "made").problems == ()


def test_ignored_modules_are_decoded(tmp_path: Path) -> None:
    source = sources.write_source(CASES["gptq_v1"], tmp_path / "source")
    recipe = convert_recipe("awq", ignore=["**.down_proj"])
    shardq.quantize(source, recipe, output_dir=tmp_path / "made", limits=ONE)
    found = entries(tmp_path / "made")
    assert {e["outcome"] for n, e in found.items() if "down_proj" in n} == {"decoded"}
    block = json.loads((tmp_path / "made" / "config.json").read_text())["quantization_config"]
    assert any("down_proj" in name for name in block["modules_to_not_convert"])


def test_plain_sources_have_nothing_to_convert(tmp_path: Path) -> None:
    for recipe in (convert_recipe("awq"), shardq.dequantize_recipe()):
        with pytest.raises(NothingToQuantize, match="its weights are plain"):
            shardq.plan("demo", recipe)
