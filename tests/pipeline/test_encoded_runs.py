"""Quantized and stacked sources give the bytes that their unquantized twins give, however they are stored."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import encoded_sources as sources
import numpy as np
import pytest

import shardq
from shardq import Limits, make_recipe
from shardq.errors import BadOption, NonFiniteWeight, UnsupportedSource
from shardq.ledger import LEDGER, decode_ledger

CASES: Mapping[str, Any] = sources.CASES
PLACES: Mapping[str, Any] = sources.PLACES
STACKED_OUTPUT = {"inkling"}  # loaders want the stacks: there is no twin of single matrices
SPLIT = sorted(CASES.keys() - STACKED_OUTPUT)
ONE = Limits(parallel=1)
W4 = {"group_size": 32}


@pytest.fixture
def source(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """The checkpoint of a case."""
    return sources.write_source(CASES[request.param], tmp_path / "source")  # type: ignore[no-any-return]


def tensors(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    return {n: (t.dtype, t.data.shape, t.data.tobytes()) for n, t in sources.read_tensors(folder).items()}


def shards(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.glob("*.safetensors"))}


def ledger(folder: Path) -> dict[str, Any]:
    return decode_ledger((folder / LEDGER).read_bytes())


@pytest.mark.parametrize("case", SPLIT)
def test_rounded_weights_are_quantized_as_those_of_a_dequantized_checkpoint(case: str, tmp_path: Path) -> None:
    """Every byte of every shard: names, headers, what is quantized and what is kept."""
    source = sources.write_source(CASES[case], tmp_path / "source")
    twin = sources.write_twin(CASES[case], source, tmp_path / "twin", None)
    recipe = make_recipe("W4A16@auto_round", **W4, decode="rounded", requantize=True)
    made = shardq.quantize(source, recipe, output_dir=tmp_path / "made", limits=ONE)
    wanted = shardq.quantize(twin, make_recipe("W4A16@auto_round", **W4), output_dir=tmp_path / "wanted", limits=ONE)
    assert made.quantized == wanted.quantized > 0
    assert tensors(tmp_path / "made") == tensors(tmp_path / "wanted")
    config = json.loads((tmp_path / "made" / "config.json").read_text())
    assert (
        config["quantization_config"]
        == json.loads((tmp_path / "wanted" / "config.json").read_text())["quantization_config"]
    )
    assert "quantization" not in config
    assert shardq.verify(tmp_path / "made").problems == ()


@pytest.mark.parametrize("case", SPLIT)
def test_exact_weights_are_quantized_as_those_of_a_checkpoint_in_fp32(case: str, tmp_path: Path) -> None:
    """In a layout whose scales have one type whatever the weights have."""
    source = sources.write_source(CASES[case], tmp_path / "source")
    twin = sources.write_twin(CASES[case], source, tmp_path / "twin", "F32")
    recipe = make_recipe("W4A16@auto_round", **W4, requantize=True)
    shardq.quantize(source, recipe, output_dir=tmp_path / "made", limits=ONE)
    shardq.quantize(twin, make_recipe("W4A16@auto_round", **W4), output_dir=tmp_path / "wanted", limits=ONE)
    made, wanted = tensors(tmp_path / "made"), tensors(tmp_path / "wanted")
    assert made.keys() == wanted.keys()
    packed = {n for n in wanted if n.endswith(("qweight", "scales", "qzeros"))}
    assert packed
    assert [n for n in sorted(packed) if made[n] != wanted[n]] == []


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    "case",
    [
        "fp8_block",
        "nvfp4_bare",
        "gptq_v1",
        "gptq_act_order",
        "int_pack_zeros",
        "bnb4_nested",
        "mlx",
        "gpt_oss",
        "step3p5",
    ],
)
def test_scattered_tensors_give_the_same_bytes(case: str, place: str, tmp_path: Path) -> None:
    """Scales before their codes, gate and up apart, shards that need each other."""
    source = sources.write_source(CASES[case], tmp_path / "source")
    apart = sources.scatter(source, tmp_path / "apart", *PLACES[place])
    for scheme in ("W4A16@gptq", "NVFP4A16"):
        recipe = make_recipe(scheme, group_size=32 if scheme.startswith("W4") else None, requantize=True)
        outs = [tmp_path / f"{name}-{scheme}" for name in ("whole", "apart")]
        shardq.quantize(source, recipe, output_dir=outs[0], limits=ONE)
        shardq.quantize(apart, recipe, output_dir=outs[1], limits=ONE)
        assert tensors(outs[0]) == tensors(outs[1])
        assert shardq.verify(outs[1]).problems == ()


@pytest.mark.parametrize("case", sorted(CASES))
def test_every_tensor_of_the_source_is_accounted_for(case: str, tmp_path: Path) -> None:
    source = sources.write_source(CASES[case], tmp_path / "source")
    recipe = make_recipe("W4A16@compressed-tensors", **W4)
    shardq.quantize(source, recipe, output_dir=tmp_path / "made", limits=ONE)
    found = ledger(tmp_path / "made")
    assert sources.read_tensors(source).keys() <= found["tensors"].keys() | found["source"].keys()
    written = tensors(tmp_path / "made").keys()
    assert all(o in written for e in found["tensors"].values() for o in e["outputs"])
    assert not any(t[0].startswith("F8_E8M0") for t in tensors(tmp_path / "made").values())


@pytest.mark.parametrize("case", [c for c in SPLIT if CASES[c].id in {d.id for d in sources.DENSE}])
def test_dequantizing_gives_the_twin(case: str, tmp_path: Path) -> None:
    source = sources.write_source(CASES[case], tmp_path / "source")
    for dtype in (None, "F32"):
        twin = sources.write_twin(CASES[case], source, tmp_path / f"twin-{dtype}", dtype)
        out = tmp_path / f"plain-{dtype}"
        shardq.quantize(source, shardq.dequantize_recipe(dtype), output_dir=out, limits=ONE)
        assert tensors(out) == tensors(twin)
        config = json.loads((out / "config.json").read_text())
        assert config.keys().isdisjoint({"quantization_config", "quantization", "compression_config"})
        assert shardq.verify(out).problems == ()


def test_dequantized_stacks_are_as_loaders_of_the_plain_model_want_them(tmp_path: Path) -> None:
    """MXFP4 blocks lie [out, in]; transformers' gpt-oss in 16 bits wants [in, out], gate and up still alternating."""
    case = CASES["gpt_oss"]
    source = sources.write_source(case, tmp_path / "source")
    twin = tensors(sources.write_twin(case, source, tmp_path / "twin", None))
    out = tmp_path / "plain"
    shardq.quantize(source, shardq.dequantize_recipe(), output_dir=out, limits=ONE)
    made = tensors(out)
    (name,) = (n for n in made if n.endswith("layers.0.mlp.experts.gate_up_proj"))
    dtype, shape, data = made[name]
    stack = np.frombuffer(data, np.uint16).reshape(shape)
    prefix = name.removesuffix("gate_up_proj")
    for expert in range(shape[0]):
        for start, projection in enumerate(("gate_proj", "up_proj")):
            kind, rows, single = twin[f"{prefix}{expert}.{projection}.weight"]
            assert kind == dtype
            assert np.array_equal(stack[expert][:, start::2].T, np.frombuffer(single, np.uint16).reshape(rows))


def test_outputs_of_one_read_are_those_of_single_runs(tmp_path: Path) -> None:
    """Experts split in one and all of them, fp8 and integers, with two workers."""
    source = sources.write_source(CASES["gpt_oss"], tmp_path / "source")
    recipes = [make_recipe(s, group_size=g) for s, g in (("W4A16@auto_round", 32), ("MXFP4", None), ("NVFP4A16", None))]
    results = shardq.quantize_many(source, recipes, output_dir=tmp_path / "many", limits=Limits(parallel=2))
    for recipe, result in zip(recipes, results, strict=True):
        alone = tmp_path / f"alone-{recipe.scheme.name}"
        shardq.quantize(source, recipe, output_dir=alone, limits=ONE)
        assert shards(alone) == shards(result.output)


def test_kept_modules_are_decoded(tmp_path: Path) -> None:
    """No orphan of the source's format stays in the output."""
    case = CASES["fp8_block"]
    source = sources.write_source(case, tmp_path / "source")
    twin = tensors(sources.write_twin(case, source, tmp_path / "twin", None))
    recipe = make_recipe("W4A16", **W4, ignore=["**.down_proj"])
    shardq.quantize(source, recipe, output_dir=tmp_path / "made", limits=ONE)
    made, entries = tensors(tmp_path / "made"), ledger(tmp_path / "made")["tensors"]
    kept = [n for n in entries if n.endswith("down_proj.weight")]
    assert kept
    assert all(entries[n]["outcome"] == "decoded" and made[n] == twin[n] for n in kept)
    assert {t[0] for t in made.values()} <= {"BF16", "F16", "F32", "I32"}


def test_stacks_can_be_kept_whole(tmp_path: Path) -> None:
    source = sources.write_source(CASES["gpt_oss_bf16"], tmp_path / "source")
    recipe = make_recipe("W4A16@compressed-tensors", **W4, ignore=["model.layers.0.mlp.experts"])
    shardq.quantize(source, recipe, output_dir=tmp_path / "made", limits=ONE)
    made, there = tensors(tmp_path / "made"), tensors(source)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    assert made[name] == there[name]
    assert not any(n.startswith("model.layers.0.mlp.experts.0.") for n in made)
    assert any(n.startswith("model.layers.1.mlp.experts.0.gate_proj.weight_packed") for n in made)
    config = json.loads((tmp_path / "made" / "config.json").read_text())["quantization_config"]
    expressions = [n.removeprefix("re:") for n in config["ignore"] if n.startswith("re:")]
    asked = "model.layers.{}.mlp.experts.0.gate_proj"  # what vLLM looks for
    assert [any(re.match(p, asked.format(layer)) for p in expressions) for layer in (0, 1)] == [True, False]


def test_outputs_of_one_read_split_the_same_stacks(tmp_path: Path) -> None:
    source = sources.write_source(CASES["gpt_oss_bf16"], tmp_path / "source")
    recipes = [make_recipe("W4A16", **W4), make_recipe("W8A16", **W4, ignore=["model.layers.0.mlp.experts"])]
    with pytest.raises(BadOption, match="a weight of its own for some outputs only"):
        shardq.quantize_many(source, recipes, output_dir=tmp_path / "many", limits=ONE)


def test_a_scale_that_is_no_number_stops_the_run(tmp_path: Path) -> None:
    source = sources.write_source(CASES["fp8_block"], tmp_path / "source")
    found = sources.read_tensors(source)
    name = next(n for n in found if n.endswith("down_proj.weight_scale_inv"))
    shard = next(p for p in source.glob("*.safetensors") if name.encode() in p.read_bytes()[:100_000])
    data = bytearray(shard.read_bytes())
    at = bytes(data).index(found[name].data.tobytes())
    data[at : at + 4] = np.float32(np.nan).tobytes()
    shard.write_bytes(data)
    module = name.removesuffix(".weight_scale_inv")
    for recipe in (make_recipe("W4A16", **W4), make_recipe("W4A16", **W4, ignore=[module])):
        with pytest.raises(NonFiniteWeight, match=f"{module}.weight.*decodes to nan at row"):
            shardq.quantize(source, recipe, output_dir=tmp_path / "made", limits=ONE, restart=True)


def test_codes_without_scales_stop_the_plan(tmp_path: Path) -> None:
    source = sources.write_source(CASES["fp8_block"], tmp_path / "source")
    gone = "model.layers.0.mlp.up_proj.weight_scale_inv"
    lost = sources.scatter(source, tmp_path / "lost", lambda name: 2 if name == gone else 1, 2)
    index = json.loads((lost / sources.INDEX).read_text())
    (lost / index["weight_map"].pop(gone)).unlink()
    (lost / sources.INDEX).write_text(json.dumps(index))
    with pytest.raises(UnsupportedSource, match=r"0\.mlp\.up_proj\.weight in .* without its scales"):
        shardq.plan(lost, "W4A16")
