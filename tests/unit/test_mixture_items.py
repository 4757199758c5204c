"""Of which matrices a mixture is chosen, what each option costs, and the file of the choice."""

import math
import random
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import shardq.mixture
from shardq.decide import Decision, decide
from shardq.errors import BadOption, FusedGroupSplit, LayoutRefuses
from shardq.layouts import LAYOUTS, find_layout
from shardq.mixture import Item, Option
from shardq.mixture_choice import choose
from shardq.mixture_file import (
    KEPT,
    compress,
    find_kept,
    find_matrices,
    group_matrices,
    layer_config_text,
    make_items,
    make_option,
    option_bits,
    parse_options,
)
from shardq.patterns import parse_layer_config
from shardq.plans import make_plan
from shardq.recipe import make_recipe
from shardq.schemes import PRESETS, parse_scheme

BF16 = "BF16"


# --- what must share a scheme ----------------------------------------------------------------

MOE = {"model_type": "qwen3_moe", "num_hidden_layers": 3, "vocab_size": 512, "hidden_size": 256, "num_experts": 4}


def moe(layers: int = 3) -> dict[str, dict[str, tuple[str, tuple[int, ...]]]]:
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {
        "model.embed_tokens.weight": (BF16, (512, 256)),
        "lm_head.weight": (BF16, (512, 256)),
    }
    for i in range(layers):
        p = f"model.layers.{i}."
        shapes = {f"self_attn.{n}_proj": (r, 256) for n, r in (("q", 256), ("k", 128), ("v", 128), ("o", 256))}
        shapes |= {"mlp.gate": (4, 256)}
        for e in range(4):
            e_ = f"mlp.experts.{e}."
            shapes |= {e_ + "gate_proj": (384, 256), e_ + "up_proj": (384, 256), e_ + "down_proj": (256, 384)}
        tensors |= {f"{p}{n}.weight": (BF16, s) for n, s in shapes.items()}
        tensors[p + "input_layernorm.weight"] = (BF16, (256,))
    return {"a.safetensors": tensors}


def scored(decisions: tuple[Decision, ...], count: int, seed: int = 0) -> dict[str, list[float]]:
    r = random.Random(seed)
    return {
        d.tensor.module: [d.tensor.numel * math.exp(r.gauss(0, 1)) * 8.0**-k for k in range(count)]
        for d in decisions
        if d.scheme
    }


def items_of(checkpoint: Any, recipe: Any, options: tuple[Option, ...], **extra: Any) -> tuple[Item, ...]:
    decisions, layout = decide(checkpoint, recipe), find_layout(recipe.layout)
    groups = group_matrices(find_matrices(decisions, **extra), checkpoint.config, layout.fuses)
    return make_items(groups, options, scored(decisions, len(options)), layout, recipe.scheme)


INTS = parse_options("W2A16G64,W4A16,W8A16", find_layout("auto_round"))


def test_items_are_fused_groups_experts_of_a_layer_and_single_matrices(make_checkpoint: Any) -> None:
    items = items_of(make_checkpoint(moe(), MOE), make_recipe("W4A16"), INTS)
    p = "model.layers.1."
    assert [(i.name.removeprefix(p), i.kind, len(i.modules), i.weights) for i in items if i.name.startswith(p)] == [
        ("self_attn.q_proj+k_proj+v_proj", "q_proj+k_proj+v_proj", 3, 512 * 256),
        ("self_attn.o_proj", "o_proj", 1, 65536),
        ("mlp.experts", "experts", 12, 12 * 384 * 256),
    ]
    assert len(items) == 9


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("model.layers.0.mlp.experts.11.up_proj", "model.layers.0.mlp.experts"),
        ("model.layers.0.block_sparse_moe.experts.3.w1", "model.layers.0.block_sparse_moe.experts"),
        ("model.layers.0.mlp.switch_mlp.up_proj", "model.layers.0.mlp.switch_mlp"),
        ("model.layers.0.moe.7.up_proj", "model.layers.0.moe"),
        ("layers.0.ffn.experts.7.mlp.w1", "layers.0.ffn.experts"),
        ("model.layers.0.mlp.shared_experts.up_proj", "model.layers.0.mlp.shared_experts.up_proj"),
        ("model.layers.0.moe.up_proj", "model.layers.0.moe.up_proj"),
    ],
)
def test_routed_experts_are_told_by_name(module: str, name: str) -> None:
    from shardq.mixture_file import Matrix

    assert group_matrices([Matrix(module, (8, 8), BF16)], None)[0].name == name


def test_heads_and_modules_with_a_rule_are_fixed_and_counted(make_checkpoint: Any) -> None:
    rules = {"model.layers.0.self_attn.o_proj": "W8A16", "model.layers.1.self_attn.o_proj": {"bits": 16}}
    recipe = make_recipe("W4A16", quant_lm_head=True, layer_config=rules)
    items = {i.name: i for i in items_of(make_checkpoint(moe(), MOE), recipe, INTS)}
    assert [o.name for o in items["lm_head"].options] == ["W4A16"]
    assert [o.name for o in items["model.layers.0.self_attn.o_proj"].options] == ["W8A16"]
    kept = items["model.layers.1.self_attn.o_proj"]
    assert (kept.options, kept.bits, kept.damages) == ((KEPT,), (65536 * 16,), (0.0,))


def test_an_expert_of_its_own_is_refused(make_checkpoint: Any) -> None:
    rules = {f"model.layers.0.mlp.experts.2.{n}_proj": "W8A16" for n in ("gate", "up", "down")}
    with pytest.raises(FusedGroupSplit, match=r"layers\.0\.mlp\.experts: its 12 matrices.*W8A16, free"):
        items_of(make_checkpoint(moe(), MOE), make_recipe("W4A16", layer_config=rules), INTS)


def test_kept_tensors_count_only_when_asked(make_checkpoint: Any) -> None:
    checkpoint = make_checkpoint(moe(), MOE)
    few = items_of(checkpoint, make_recipe("W4A16"), INTS)
    all_ = items_of(checkpoint, make_recipe("W4A16"), INTS, count_kept=True)
    assert sum(i.weights for i in all_) == sum(t.numel for t in checkpoint.tensors.values())
    assert {i.name for i in all_} - {i.name for i in few} >= {"lm_head.weight", "model.layers.0.input_layernorm.weight"}


def test_bits_are_what_the_layout_writes(make_checkpoint: Any) -> None:
    checkpoint = make_checkpoint(moe(), MOE)
    for name in ("auto_round", "gptq", "compressed-tensors"):
        recipe = make_recipe("W4A16", layout=name)
        items = items_of(checkpoint, recipe, parse_options("W4A16,W8A16", find_layout(name)))
        plan = make_plan(checkpoint, recipe)
        suffixes = ("qweight", "qzeros", "scales", "g_idx", "weight_packed", "weight_scale", "weight_shape")
        written = sum(
            end - begin for f in plan.files for t, (begin, end) in f.offsets.items() if t.rpartition(".")[2] in suffixes
        )
        assert sum(i.bits[0] for i in items) == 8 * written, name


def test_scale_bits_may_be_ignored() -> None:
    layout = find_layout("auto_round")
    assert option_bits(INTS[1], BF16, (256, 256), layout, ignore_scale_bits=True) == 4 * 65536
    assert option_bits(INTS[1], BF16, (256, 256), layout) > 4.1 * 65536


def test_options_that_the_layout_refuses_are_not_offered(make_checkpoint: Any) -> None:
    shards = moe(1)
    shards["a.safetensors"]["model.layers.0.self_attn.o_proj.weight"] = (BF16, (256, 192))
    recipe = make_recipe("W4A16", group_size=64, layout="compressed-tensors")
    options = parse_options("W4A16G64,W8A16", find_layout(recipe.layout))
    items = {i.name: i for i in items_of(make_checkpoint(shards, MOE), recipe, options)}
    assert [o.name for o in items["model.layers.0.self_attn.o_proj"].options] == ["W4A16G64"]
    assert len(items["model.layers.0.mlp.experts"].options) == 2
    recipe = make_recipe("W4A16")
    with pytest.raises(LayoutRefuses, match=r"cannot mix symmetric.*no module can have W4A16_ASYM"):
        items_of(make_checkpoint(moe(), MOE), recipe, parse_options("W4A16,W4A16_ASYM", find_layout("auto_round")))
    with pytest.raises(LayoutRefuses, match="none of the --options"):
        items_of(make_checkpoint(moe(), MOE), recipe, parse_options("MXFP4,MXFP8", find_layout("auto_round")))


def test_options_are_schemes_of_one_kind() -> None:
    layout = find_layout("auto_round")
    assert [o.name for o in parse_options("w2a16g64, W4A16 ,bf16", layout)] == ["W2A16G64", "W4A16", "BF16"]
    for text, words in (("W4A16", "two schemes"), ("W4A16,w4a16", "twice"), ("W4A16_MIXED,W8A16", "mixture itself")):
        with pytest.raises(BadOption, match=words):
            parse_options(text, layout)


def test_damages_of_a_group_are_added_and_must_be_there(make_checkpoint: Any) -> None:
    checkpoint, recipe, layout = make_checkpoint(moe(1), MOE), make_recipe("W4A16"), find_layout("auto_round")
    decisions = decide(checkpoint, recipe)
    groups = group_matrices(find_matrices(decisions), MOE)
    damages = {d.tensor.module: (3.0, 2.0, 1.0) for d in decisions if d.scheme}
    items = make_items(groups, INTS, damages, layout, recipe.scheme)
    assert [i.damages[0] for i in items] == [9.0, 3.0, 36.0]
    del damages["model.layers.0.self_attn.k_proj"]
    with pytest.raises(BadOption, match=r"k_proj has 0 damages"):
        make_items(groups, INTS, damages, layout, recipe.scheme)


# --- the file --------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [2.6, 3.5, 4.5, 6.0])
@pytest.mark.parametrize("name", ["auto_round", "compressed-tensors"])
def test_the_file_gives_the_same_decisions_again(
    make_checkpoint: Any, tmp_path: Path, target: float, name: str
) -> None:
    checkpoint = make_checkpoint(moe(), MOE)
    options = parse_options(
        "W2A16G64,W4A16,W8A16" if name == "auto_round" else "MXFP4A16,W4A16G32,FP8", find_layout(name)
    )
    base = make_recipe("W4A16", layout=name)
    items = items_of(checkpoint, base, options)
    target = max(target, 4.4) if name != "auto_round" else target
    found = choose(items, target)
    path = tmp_path / "mixture.toml"
    path.write_text(layer_config_text(items, found, "tiny", target), encoding="utf-8")
    for default in ("W4A16", "W8A16"):
        decisions = decide(checkpoint, make_recipe(default, layout=name, layer_config=str(path)))
        assert {d.tensor.module: d.scheme for d in decisions if d.scheme} == {
            m: found.choice[i.name].scheme for i in items for m in i.modules
        }
    plan = make_plan(checkpoint, make_recipe("W4A16", layout=name, layer_config=str(path)))
    written = [end - begin for f in plan.files for t, (begin, end) in f.offsets.items() if "proj" in t]
    measured = 8 * sum(written) / found.weights
    assert measured == found.average_bits <= target


def test_the_file_can_be_read_and_edited(make_checkpoint: Any) -> None:
    items = items_of(make_checkpoint(moe(), MOE), make_recipe("W4A16"), INTS)
    two, four, eight = INTS
    choice = {i.name: two if i.kind == "experts" else four for i in items}
    choice["model.layers.1.mlp.experts"] = choice["model.layers.2.self_attn.o_proj"] = eight
    found = shardq.mixture.Mixture(choice, 10, 9, 2, 1.5, 1.5)
    text = layer_config_text(items, found, "org/name\nrm -rf", 4.5)
    head, _, body = text.partition("\n\n")
    assert all(line.startswith("#") for line in head.splitlines())
    assert "# Bits for each weight: target 4.5, this file 4.5000, scales included; 2 weights" in head
    assert "# | experts | 3 |" in head
    assert "W2A16G64 2, W8A16 1 |" in head
    assert body.splitlines() == [
        '"model.layers.*.self_attn.k_proj" = "W4A16"',
        '"model.layers.2.self_attn.o_proj" = "W8A16"',
        '"model.layers.*.self_attn.o_proj" = "W4A16"',
        '"model.layers.*.self_attn.q_proj" = "W4A16"',
        '"model.layers.*.self_attn.v_proj" = "W4A16"',
        *(
            f'"model.layers.{layer}.mlp.experts.*.{n}_proj" = "{scheme}"'
            for n in ("down", "gate", "up")
            for layer, scheme in (("1", "W8A16"), ("*", "W2A16G64"))
        ),
    ]


SEGMENTS = st.sampled_from(["0", "1", "2", "10", "a", "b", "experts", "x*", "é", '"q"', "\x7f", "weight"])
NAMES = st.lists(SEGMENTS, min_size=1, max_size=4).map(".".join)


@given(st.dictionaries(NAMES, st.sampled_from([Option("W4A16", None), Option("W8A16", None), KEPT]), max_size=30))
def test_compressed_patterns_mean_what_was_chosen(named: dict[str, Option]) -> None:
    from shardq.mixture_file import _quoted

    text = "\n".join(f"{_quoted(p)} = {_quoted(o.name)}" for p, o in compress(named).items())
    rules = parse_layer_config(tomllib.loads(text), "shardq")
    exact = {r.pattern.body: r.scheme for r in rules if r.pattern.kind == "exact"}
    for module, option in named.items():
        hit = exact.get(module) or next(r.scheme for r in rules if r.pattern.matches(module))
        assert hit == option.name, (module, text)
    assert compress(dict(reversed(named.items()))) == compress(named)


def test_what_a_fused_group_keeps_is_kept_by_the_file_too(make_checkpoint: Any, tmp_path: Path) -> None:
    """Kimi's linear attention keeps q, k and v with its small b; q of its other layers has the same name but number."""
    config = {"model_type": "kimi_linear", "num_hidden_layers": 2, "hidden_size": 256}
    p, q = "model.layers.0.self_attn.", "model.layers.1.self_attn."
    shapes = {f"{p}{n}_proj.weight": (BF16, (256, 256)) for n in "qkvo"}
    shapes |= {p + "b_proj.weight": (BF16, (4, 256)), q + "q_proj.weight": (BF16, (256, 256))}
    checkpoint = make_checkpoint({"a.safetensors": shapes}, config)
    recipe = make_recipe("W4A16")
    decisions = decide(checkpoint, recipe)
    assert find_kept(decisions) == tuple(f"{p}{n}_proj" for n in "qkv")
    items = items_of(checkpoint, recipe, INTS)
    path = tmp_path / "mixture.toml"
    path.write_text(layer_config_text(items, choose(items, 4.5), kept=find_kept(decisions)))
    again = decide(checkpoint, make_recipe("W4A16", layer_config=str(path)))
    assert [d.tensor.module for d in again if d.scheme] == [p + "o_proj", q + "q_proj"]


def test_every_scheme_of_every_layout_comes_back_by_its_name() -> None:
    for layout in LAYOUTS:
        for preset in PRESETS.values():
            scheme = layout.settle(preset.scheme)
            if layout.refuse(scheme, scheme, 4096, 4096) is None:
                again = layout.settle(parse_scheme(make_option(scheme).name).scheme)
                assert again == scheme, (layout.name, preset.name)
