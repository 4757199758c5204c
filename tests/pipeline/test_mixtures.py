"""Mixtures for a size: chosen from scores of sampled rows, written as a layer config, and quantized."""

import tomllib
from collections.abc import Mapping
from pathlib import Path

import encoded_sources as sources
import pytest

import shardq
from shardq import Limits, make_recipe
from shardq.errors import BadOption, FusedGroupSplit
from shardq.fused import fused_groups
from shardq.mixing import mix
from shardq.sources import open_source

ONE = Limits(parallel=1)
OPTIONS = "W2A16G32,W4A16,W8A16"


def bits_of(plan: shardq.Plan) -> float:
    """Bits for a weight of what is quantized, from the plan's own files."""
    quantized = {d.tensor.module: d.tensor.numel for d in plan.decisions if d.scheme}
    size = sum(
        end - begin
        for f in plan.files
        for name, (begin, end) in f.offsets.items()
        if name.rpartition(".")[0] in quantized and not name.endswith(".bias")
    )
    return 8 * size / sum(quantized.values())


def schemes(plan: shardq.Plan) -> Mapping[str, str]:
    return {d.tensor.module: d.scheme.name for d in plan.decisions if d.scheme}


@pytest.mark.parametrize("target", [3.4, 4.5, 6.0])
def test_output_has_the_bits_that_were_wanted(target: float, tmp_path: Path) -> None:
    mixed = shardq.mix("demo", options=OPTIONS, target_bits=target)
    path = tmp_path / "layers.toml"
    path.write_text(mixed.text)
    recipe = make_recipe("W4A16", layer_config=str(path))
    plan = shardq.plan("demo", recipe)
    assert target * 0.995 <= mixed.mixture.average_bits <= target
    assert bits_of(plan) == pytest.approx(mixed.mixture.average_bits, rel=1e-9)
    assert len(set(schemes(plan).values())) > 1
    chosen = schemes(plan)
    for group in fused_groups(chosen, plan.checkpoint.config).values():
        assert len({chosen[m] for m in group}) == 1
    experts = {s for m, s in chosen.items() if ".layers.1.mlp.experts." in m}
    assert len(experts) <= 1
    shardq.quantize("demo", recipe, output_dir=tmp_path / "out", limits=ONE)
    assert shardq.verify(tmp_path / "out", deep=True, source="demo").problems == ()


def test_the_same_choice_for_any_number_of_threads() -> None:
    recipe = make_recipe("W4A16")
    found = [mix(open_source("demo"), recipe, OPTIONS, 4.5, threads=n) for n in (1, 2, 5)]
    assert len({m.text for m in found}) == 1


def test_more_bits_do_less_harm() -> None:
    """At targets that the demo's few matrices come near to without being made worse (see `choose`)."""
    damages = [shardq.mix("demo", options=OPTIONS, target_bits=t).mixture.damage for t in (3.4, 3.8, 4.6, 7.0)]
    assert damages == sorted(damages, reverse=True)
    assert damages[0] > 4 * damages[-1]


def test_a_users_own_rules_are_fixed() -> None:
    module = "model.layers.0.mlp.down_proj"
    mixed = shardq.mix("demo", make_recipe("W4A16", layer_config={module: {"bits": 8}}), options=OPTIONS, target_bits=4)
    again = shardq.plan("demo", make_recipe("W4A16", layer_config=tomllib.loads(mixed.text)))
    assert schemes(again)[module] == "W8A16"
    with pytest.raises(FusedGroupSplit):
        shardq.mix(
            "demo", make_recipe("W4A16", layer_config={"**.q_proj": {"bits": 8}}), options=OPTIONS, target_bits=5
        )


@pytest.mark.parametrize(
    ("options", "target", "reason"),
    [
        (OPTIONS, 1.0, "cannot be met"),
        (OPTIONS, 16.0, "cannot be met"),
        ("W4A16", 4.5, "two schemes or more"),
        ("W4A16,NVFP4A16", 4.5, "."),
    ],
)
def test_what_cannot_be_is_refused(options: str, target: float, reason: str) -> None:
    with pytest.raises(shardq.ShardqError, match=reason):
        shardq.mix("demo", options=options, target_bits=target)


def test_quantized_sources_are_scored_as_they_decode(tmp_path: Path) -> None:
    source = sources.write_source(sources.CASES["fp8_block"], tmp_path / "source")
    twin = sources.write_twin(sources.CASES["fp8_block"], source, tmp_path / "twin", None)
    options = "W2A16G32,W4A16G32,W8A16G32"
    recipe = make_recipe("W4A16", group_size=32, decode="rounded")
    found = shardq.mix(source, recipe, options=options, target_bits=5)
    wanted = shardq.mix(twin, make_recipe("W4A16", group_size=32), options=options, target_bits=5)
    assert found.mixture.damage == wanted.mixture.damage
    assert tomllib.loads(found.text) == tomllib.loads(wanted.text)


def test_a_target_needs_options() -> None:
    with pytest.raises(BadOption, match="given twice"):
        shardq.mix("demo", options="W4A16,W4A16", target_bits=4.5)
