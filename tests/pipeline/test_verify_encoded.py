"""`verify` of outputs whose source has its weights encoded, or in stacks."""

import random
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import encoded_sources as sources
import pytest
from weight_files import flip, tensors_of

import shardq
from shardq import Limits, make_recipe
from shardq.ledger import LEDGER, decode_ledger, encode_ledger
from shardq.recipe import convert_recipe, dequantize_recipe

CASES: Mapping[str, Any] = sources.CASES
MODES = ("exact", "rounded")
LAYER = r"re:.*layers\.1\.mlp.*"
RUNS: dict[str, tuple[str, dict[str, Any]]] = {  # case -> scheme, options; layer 1's MLP or experts stay as they are
    "fp8_block": ("W4A16", {"ignore": [LAYER]}),
    "gptq_act_order": ("W4A16G32@gptq", {"ignore": [LAYER]}),
    "gptq_v2": ("W8A16", {"ignore": [LAYER]}),
    "bnb4_nested": ("W4A16G64", {"ignore": [LAYER]}),
    "gpt_oss": ("W4A16", {"ignore": [LAYER]}),
    "gpt_oss_bf16": ("W4A16", {"ignore": [LAYER, r"re:.*layers\.0\.mlp\.experts\.1\..*"]}),
    "mlx_switch": ("W4A16@mlx", {"ignore": [LAYER]}),
}
each_case = pytest.mark.parametrize("case", CASES)
each_run = pytest.mark.parametrize("case", RUNS)
each_mode = pytest.mark.parametrize("decode", MODES)


def quantize(case: str, source: Path, out: Path, decode: str = "exact") -> Path:
    scheme, options = RUNS.get(case, ("W4A16", {}))
    recipe = make_recipe(scheme, decode=decode, ragged="keep", **options)
    shardq.quantize(source, recipe, output_dir=out, limits=Limits(parallel=1))
    return out


def read_ledger(out: Path) -> dict[str, Any]:
    return decode_ledger((out / LEDGER).read_bytes())


def problems_of(out: Path, source: Path) -> tuple[str, ...]:
    return shardq.verify(out, source=source).problems


@each_case
@each_mode
def test_output_of_each_kind_is_sound(case: str, decode: str, written: Callable[[str], Path], tmp_path: Path) -> None:
    source = written(case)
    out = quantize(case, source, tmp_path / "out", decode)
    assert shardq.verify(out).problems == ()
    found = shardq.verify(out, deep=True, source=source)
    assert found.problems == ()
    assert found.compared == found.tensors == len(read_ledger(out)["tensors"])


@each_mode
def test_outcomes_are_all_here(decode: str, written: Callable[[str], Path], tmp_path: Path) -> None:
    """Whole stacks, single matrices, and biases that lie apart were kept."""
    kept = {
        "fp8_block": ["model.layers.1.mlp.up_proj.weight"],
        "gpt_oss": [f"model.layers.1.mlp.experts.{p}_proj" for p in ("gate_up", "down")],
        "gpt_oss_bf16": [f"model.layers.0.mlp.experts.1.gate_proj.{leaf}" for leaf in ("weight", "bias")],
    }
    for case, names in kept.items():
        ledger = read_ledger(quantize(case, written(case), tmp_path / case, decode))
        assert {ledger["tensors"][n]["outcome"] for n in names} == {"decoded"}
        assert "quantized" in {e["outcome"] for e in ledger["tensors"].values()}
    assert {e["outcome"] for e in ledger["source"].values()} == {"split"}


@each_run
@each_mode
def test_one_flipped_bit_in_any_tensor_is_found(
    case: str, decode: str, written: Callable[[str], Path], tmp_path: Path
) -> None:
    source = written(case)
    out = quantize(case, source, tmp_path / "out", decode)
    rng = random.Random(case)
    entries = read_ledger(out)["tensors"]
    owners = {output: name for name, e in entries.items() for output in e["outputs"]}
    for path, t in tensors_of(out):
        at, bit = rng.randrange(t.begin, t.end), rng.randrange(8)
        if t.dtype in ("F16", "BF16", "F32"):
            at = t.begin + (at - t.begin) // 2 * 2 + 1  # not the last bits of a scale that few weights have
        flip(path, at, bit)
        found = problems_of(out, source)
        flip(path, at, bit)
        name = owners[t.name]
        assert found, t.name
        if "place" not in entries[name]:
            assert all(p.startswith(f"{name}") for p in found)
    assert problems_of(out, source) == ()


@pytest.mark.parametrize("case", ["fp8_block", "gptq_act_order", "bnb4_nested", "gpt_oss", "gpt_oss_bf16"])
def test_other_codes_and_scales_are_found(case: str, tmp_path: Path) -> None:
    """Codes, scales of any level, zero points."""
    source = sources.write_source(CASES[case], tmp_path / "source")
    out = quantize(case, source, tmp_path / "out")
    for path, t in tensors_of(source):
        if "bitsandbytes" in t.name or t.name.endswith("quant_map"):
            continue  # what the headers had to go with, and a table that has more than is used
        before, data = path.read_bytes(), bytearray(path.read_bytes())
        size = {"F32": 4, "BF16": 2, "F16": 2}.get(t.dtype, 1)
        for at in range(t.begin, t.end, max(1, (t.end - t.begin) // size // 64) * size):
            data[at + size - 1] ^= 64  # of floats the highest byte: 16 bits keep it
        path.write_bytes(data)
        assert problems_of(out, source), t.name
        path.write_bytes(before)
    assert problems_of(out, source) == ()


@pytest.mark.parametrize("place", sources.PLACES)
@pytest.mark.parametrize("case", ["fp8_block", "gpt_oss", "gptq_v1", "nvfp4_modelopt"])
def test_parts_may_lie_in_any_shard(case: str, place: str, written: Callable[[str], Path], tmp_path: Path) -> None:
    source = sources.scatter(written(case), tmp_path / "source", *sources.PLACES[place])
    out = quantize(case, source, tmp_path / "out")
    assert shardq.verify(out, deep=True, source=source).problems == ()
    assert shardq.audit(out, source=source).problems == ()


@pytest.mark.parametrize("case", ["fp8_block", "gptq_v2", "bnb4_nested", "gpt_oss", "qwen3_moe"])
@pytest.mark.parametrize("dtype", [None, "F32"])
def test_dequantized_source_is_sound(
    case: str, dtype: str | None, written: Callable[[str], Path], tmp_path: Path
) -> None:
    source, out = written(case), tmp_path / "out"
    shardq.quantize(source, dequantize_recipe(dtype), output_dir=out, limits=Limits(parallel=1))
    assert shardq.verify(out, deep=True, source=source).problems == ()
    assert shardq.audit(out, source=source).problems == ()


@pytest.mark.parametrize(
    ("case", "layout"),
    [("gptq_v2", "auto_round"), ("awq", "gptq"), ("mxfp4_ct", "mlx"), ("nvfp4_ct", "compressed-tensors")],
)
def test_carried_codes_are_sound(case: str, layout: str, written: Callable[[str], Path], tmp_path: Path) -> None:
    source, out = written(case), tmp_path / "out"
    shardq.quantize(source, convert_recipe(layout), output_dir=out, limits=Limits(parallel=1))
    carried = [n for n, e in read_ledger(out)["tensors"].items() if "carried" in e]
    assert carried
    assert shardq.verify(out, deep=True, source=source).problems == ()
    assert shardq.audit(out, source=source).problems == ()
    path, t = next((p, t) for p, t in tensors_of(out) if re.search(r"o_proj\.(qweight|weight(_packed)?)$", t.name))
    flip(path, t.begin + 5, 1)
    assert problems_of(out, source)
    assert shardq.audit(out, source=source).problems


# --- ledgers ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def changed(written: Callable[[str], Path], tmp_path: Path) -> Callable[..., tuple[tuple[str, ...], tuple[str, ...]]]:
    """changed(case, change): problems of an output after a change of its ledger: without its source, and with it."""

    def change_ledger(
        case: str, change: Callable[[dict[str, Any], dict[str, Any]], object]
    ) -> tuple[tuple[str, ...], tuple[str, ...]]:
        out = quantize(case, written(case), tmp_path / "out")
        ledger = read_ledger(out)
        change(ledger["tensors"], ledger["source"])
        (out / LEDGER).write_bytes(encode_ledger(ledger))
        return shardq.verify(out).problems, problems_of(out, written(case))

    return change_ledger


def test_source_that_is_not_accounted_for_is_found(changed: Any) -> None:
    alone, beside = changed("fp8_block", lambda _, s: s.pop("model.layers.0.self_attn.q_proj.weight_scale_inv"))
    assert alone == ()
    assert beside == ("model.layers.0.self_attn.q_proj.weight_scale_inv is in the source and not in the ledger",)


def test_source_that_is_not_there_is_found(changed: Any) -> None:
    entry = {"outcome": "dropped", "into": "", "reason": "none"}
    alone, beside = changed("fp8_block", lambda _, s: s.update({"other": entry}))
    assert alone == ()
    assert beside == ("other is not in the source as the ledger has it",)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"outcome": "lost"}, "has outcome 'lost' in the ledger's source"),
        ({"into": "model.layers.7.mlp.experts"}, "the ledger has no"),
        ({"into": ""}, "the ledger has no"),
    ],
)
@pytest.mark.parametrize("case", ["gpt_oss", "gpt_oss_bf16"])
def test_fate_that_nothing_goes_with_is_found_without_the_source(
    case: str, change: dict[str, str], words: str, changed: Any
) -> None:
    name = "model.layers.0.mlp.experts.gate_up_proj" + ("_blocks" if case == "gpt_oss" else "")
    alone, beside = changed(case, lambda _, s: s[name].update(change))
    assert len(alone) == 1
    assert alone[0].startswith(name)
    assert words in alone[0]
    assert beside == alone


def test_weight_that_is_a_part_of_another_is_found(changed: Any) -> None:
    def claim(tensors: dict[str, Any], source: dict[str, Any]) -> None:
        source["model.norm.weight"] = {**next(iter(source.values()))}

    alone, _ = changed("fp8_block", claim)
    assert alone == ("model.norm.weight is a weight in the ledger and, as decoded, a part of others",)


@pytest.mark.parametrize(("key", "value"), [("dtype", "F16"), ("shape", [128, 256, 1]), ("outcome", "copied")])
def test_decoded_weight_is_what_its_entry_says(key: str, value: Any, changed: Any) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    alone, beside = changed("fp8_block", lambda t, _: t[name].update({key: value}))
    if key == "outcome":  # there is no difference without the source
        assert alone == ()
        assert beside == (f"{name} is not in the source as the ledger has it",)
    else:
        assert len(alone) == 1
        assert alone[0].startswith(f"{name} in model-00002")


def test_stack_that_the_ledger_hides_is_found(changed: Any) -> None:
    """Without its name it counts as split, and its experts are missing."""
    name = "model.layers.1.mlp.experts.down_proj"
    alone, beside = changed("gpt_oss", lambda t, _: t.pop(name))
    assert f"{name} in model-00002-of-00003.safetensors is in no ledger entry" in alone
    assert beside == alone


def test_ledger_of_an_earlier_version_verifies(checkpoint: Path, tmp_path: Path) -> None:
    """Its sources had nothing encoded, and no section that says so."""
    out = tmp_path / "out"
    shardq.quantize(checkpoint, output_dir=out, limits=Limits(parallel=1))
    ledger = read_ledger(out)
    assert ledger.pop("source") == {}
    (out / LEDGER).write_bytes(encode_ledger(ledger))
    assert shardq.verify(out, deep=True, source=checkpoint).problems == ()
    assert shardq.audit(out, source=checkpoint).problems == ()
