import gzip
import json
import time
from pathlib import Path
from typing import Any

import pytest

from shardq.decide import Decision, decide
from shardq.errors import FusedGroupSplit
from shardq.fused import fused_groups
from shardq.recipe import make_recipe

DATA = Path(__file__).parents[1] / "data" / "hub_index"
BF16 = "BF16"


def headers(model: str) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    folder = DATA / model
    shards = json.loads(gzip.decompress((folder / "headers.json.gz").read_bytes()))
    return shards, json.loads((folder / "config.json").read_text())


def modules_of(names: Any) -> list[str]:
    return [n.removesuffix(".weight") for n in names if n.endswith(".weight")]


GROUPS = [  # modules below one parent, model type, the groups among them
    ("q_proj k_proj v_proj o_proj", "llama", ["q_proj k_proj v_proj"]),
    ("k_proj q_proj o_proj", "gemma4", ["q_proj k_proj"]),  # v is k
    ("up_proj gate_proj down_proj", None, ["gate_proj up_proj"]),
    ("w1 w2 w3", "mixtral", ["w1 w3"]),
    ("w1 w2 c_proj", "qwen", ["w2 w1"]),
    ("q_a_proj kv_a_proj_with_mqa q_b_proj kv_b_proj", "deepseek_v3", ["q_a_proj kv_a_proj_with_mqa"]),
    ("q_a_proj kv_a_proj_with_mqa g_proj", "kimi_k3", ["q_a_proj kv_a_proj_with_mqa g_proj"]),
    ("wq_a wkv wq_b wo_a", "deepseek_v4", ["wq_a wkv"]),
    (
        "in_proj_qkv in_proj_z in_proj_b in_proj_a out_proj",
        "qwen3_5_text",
        ["in_proj_qkv in_proj_z", "in_proj_b in_proj_a"],
    ),
    ("q_proj k_proj v_proj b_proj f_a_proj f_b_proj", "kimi_linear", ["q_proj k_proj v_proj b_proj f_a_proj"]),
    ("q_proj k_proj v_proj b_proj", "llama", ["q_proj k_proj v_proj"]),
    ("query key value dense", "bert", ["query key value"]),
    ("c_fc_0 c_fc_1 c_proj", "exaone", ["c_fc_0 c_fc_1"]),
    ("fc1 fc3 fc2", "dots1", ["fc1 fc3"]),
    ("fc1 fc2", "whisper", []),
    ("query_key_value dense", "falcon", []),
    ("gate_up_proj down_proj", "phi3", []),
]


@pytest.mark.parametrize(("names", "model_type", "expected"), GROUPS)
def test_groups_below_one_parent(names: str, model_type: str | None, expected: list[str]) -> None:
    parent = "model.layers.3.part."
    config = {"text_config": {"model_type": model_type}} if model_type else None
    found = fused_groups([parent + n for n in names.split()], config)
    groups = {tuple(parent + m for m in g.split()) for g in expected}
    assert set(found.values()) == groups
    assert set(found) == {m for g in groups for m in g}


def test_the_query_of_a_cross_attention_stands_alone() -> None:
    parts = [f"decoder.layers.0.{a}.{p}_proj" for a in ("self_attn", "encoder_attn") for p in "qkv"]
    found = fused_groups(parts, None)
    assert "decoder.layers.0.encoder_attn.q_proj" not in found
    assert len(found["decoder.layers.0.self_attn.v_proj"]) == 3


def test_members_of_different_parents_are_strangers() -> None:
    assert fused_groups(["layers.0.mlp.gate_proj", "layers.1.mlp.up_proj", "gate_proj"], None) == {}


def test_wizardlm_has_504_groups_of_which_37_lie_in_two_shards() -> None:
    shards, config = headers("wizardlm-2-8x22b")
    shard_of = {m: s for s, tensors in shards.items() for m in modules_of(tensors)}
    groups = set(fused_groups(shard_of, config).values())
    assert len(groups) == 504
    assert sum(len({shard_of[m] for m in g}) > 1 for g in groups) == 37


def test_seventy_thousand_modules_take_well_under_a_second() -> None:
    names = [
        f"model.layers.{i}.mlp.experts.{e}.{p}_proj"
        for i in range(61)
        for e in range(384)
        for p in ("gate", "up", "down")
    ]
    begin = time.process_time()
    found = fused_groups(names, {"model_type": "kimi_k2"})
    assert time.process_time() - begin < 2  # 0.1 s here; the bound leaves room for a slow machine
    assert len(found) == 61 * 384 * 2


# --- what it does to decisions -------------------------------------------------------------------


def block(columns: int = 256, key_rows: int = 128) -> dict[str, dict[str, tuple[str, tuple[int, ...]]]]:
    p = "model.layers.0."
    return {
        "a.safetensors": {
            p + "self_attn.q_proj.weight": (BF16, (256, columns)),
            p + "self_attn.k_proj.weight": (BF16, (key_rows, columns)),
            p + "self_attn.v_proj.weight": (BF16, (key_rows, columns)),
            p + "mlp.gate_proj.weight": (BF16, (384, columns)),
            p + "mlp.up_proj.weight": (BF16, (384, columns)),
            p + "mlp.down_proj.weight": (BF16, (256, 384)),
        }
    }


def schemes(decisions: tuple[Decision, ...]) -> dict[str, tuple[str, int | None]]:
    return {d.tensor.module.rpartition(".")[2]: (d.rule, d.scheme.group_size if d.scheme else None) for d in decisions}


SPLITS: list[dict[str, Any]] = [
    {"ignore": ["re:.*q_proj"]},
    {"layer_config": {"**.up_proj": {"bits": 8}}},
    {"layer_config": {"**.v_proj": {"bits": 16}}},
    {"layer_config": {"**.gate_proj": {"group_size": 64}}},
]


@pytest.mark.parametrize("layout", ["auto_round", "gptq", "compressed-tensors"])
@pytest.mark.parametrize("options", SPLITS)
def test_options_that_split_a_group_are_refused(make_checkpoint: Any, options: dict[str, Any], layout: str) -> None:
    recipe = make_recipe("W4A16", layout=layout, **options)
    with pytest.raises(FusedGroupSplit, match=r"1 groups .* model\.layers\.0\..*_proj .*kept|W4A16G64|W8A16"):
        decide(make_checkpoint(block(), {}), recipe)


def test_the_message_names_members_with_what_they_got(make_checkpoint: Any) -> None:
    with pytest.raises(FusedGroupSplit) as refused:
        decide(make_checkpoint(block(), {}), make_recipe("W4A16", ignore=["**.k_proj"]))
    told = str(refused.value)
    assert "model.layers.0.self_attn: q_proj W4A16 (default), k_proj kept (ignore:**.k_proj), v_proj" in told
    assert "--ignore" in told
    assert "\n" not in told


def test_whole_groups_may_differ(make_checkpoint: Any) -> None:
    options: dict[str, Any] = {
        "ignore": ["**.self_attn.*"],
        "layer_config": {"re:.*(gate|up)_proj": {"bits": 8, "group_size": 64}},
    }
    got = schemes(decide(make_checkpoint(block(), {}), make_recipe("W4A16", **options)))
    assert [got[m][1] for m in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj")] == [
        None, None, None, 64, 64, 128,
    ]  # fmt: skip


def test_ragged_keep_of_one_member_keeps_all(make_checkpoint: Any) -> None:
    checkpoint = make_checkpoint(block(key_rows=48), {})  # 48 rows: no multiple of 32
    got = schemes(decide(checkpoint, make_recipe("W4A16", layout="auto_round", ragged="keep")))
    assert got["q_proj"] == got["k_proj"] == got["v_proj"] == ("ragged:keep", None)
    assert got["up_proj"] == ("default", 128)


def test_ragged_shrink_of_one_member_shrinks_all(make_checkpoint: Any) -> None:
    options: dict[str, Any] = {"group_size": 32, "layer_config": {"**.q_proj": {"group_size": 128}}, "ragged": "shrink"}
    got = schemes(decide(make_checkpoint(block(columns=224), {}), make_recipe("W4A16", **options)))
    assert got["q_proj"] == ("ragged:shrink", 32)
    wide: dict[str, Any] = {"layer_config": {"**.q_proj": {"group_size": 32}}, "ragged": "shrink"}
    got = schemes(decide(make_checkpoint(block(columns=192), {}), make_recipe("W4A16", **wide)))
    assert {got[m] for m in ("k_proj", "v_proj")} == {("ragged:shrink", 32)}
    assert got["gate_proj"] == ("ragged:shrink", 64)


def test_what_the_default_rule_keeps_takes_its_partners_with_it(make_checkpoint: Any) -> None:
    shards = block()
    shards["a.safetensors"]["model.layers.0.self_attn.b_proj.weight"] = (BF16, (32, 256))
    checkpoint = make_checkpoint(shards, {"model_type": "kimi_linear"})
    got = schemes(decide(checkpoint, make_recipe("W4A16")))
    assert got["q_proj"] == got["v_proj"] == ("fused", None)
    assert got["b_proj"][1] is None
    assert got["up_proj"][1] == 128
    got = schemes(decide(checkpoint, make_recipe("W4A16", include=["**.b_proj"])))
    assert {got[m][1] for m in ("q_proj", "k_proj", "v_proj", "b_proj")} == {128}
