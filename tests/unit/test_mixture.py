"""The choice of a scheme for each part of a model: the best there is, within the budget, and the same in any order."""

import itertools
import math
import os
import random
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import shardq.mixture
from shardq.decide import Decision, decide
from shardq.errors import BadOption, FusedGroupSplit, LayoutRefuses
from shardq.layouts import LAYOUTS, find_layout
from shardq.mixture import Item, Option, choose, find_budget, optimize
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


def item(name: str, bits: Sequence[int], damages: Sequence[float], weights: int = 10) -> Item:
    return Item(name, "k", (name,), weights, tuple(Option(f"o{i}", None) for i in range(len(bits))), tuple(bits),
                tuple(damages))  # fmt: skip


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[Item], int]:
    """Few items of few options, many of them alike or dominated, and a budget that can be kept."""
    unit = draw(st.sampled_from([1, 8, 4096]))
    damage = draw(
        st.sampled_from(
            [st.integers(0, 4).map(float), st.floats(0, 1e3), st.floats(1e-300, 1e-290), st.floats(0, 1e30)]
        )
    )
    option = st.tuples(st.integers(0, 12).map(lambda n: n * unit), damage)
    items = [
        item(f"i{k}", *zip(*draw(st.lists(option, min_size=1, max_size=4)), strict=True))
        for k in range(draw(st.integers(1, 6)))
    ]
    least, largest = sum(min(i.bits) for i in items), sum(max(i.bits) for i in items)
    return items, draw(st.integers(least, largest + 2))


def least_damage(items: Sequence[Item], budget: int, floor: int = 0) -> float | None:
    sums = (
        (sum(i.bits[c] for i, c in zip(items, cs, strict=True)), [i.damages[c] for i, c in zip(items, cs, strict=True)])
        for cs in itertools.product(*(range(len(i.options)) for i in items))
    )
    return min((math.fsum(damages) for bits, damages in sums if floor <= bits <= budget), default=None)


def same(a: float, b: float | None) -> bool:
    return b is not None and math.isclose(a, b, rel_tol=1e-12)


# --- the best choice -------------------------------------------------------------------------


@given(problems())
def test_no_choice_is_better(problem: tuple[list[Item], int]) -> None:
    items, budget = problem
    found = optimize(items, budget)
    assert same(found.damage, least_damage(items, budget))
    assert found.is_proven
    assert found.bits <= budget
    assert found.weights == 10 * len(items)
    own = {i.name: dict(zip(i.options, zip(i.bits, i.damages, strict=True), strict=True)) for i in items}
    assert found.bits == sum(own[n][o][0] for n, o in found.choice.items())
    assert found.damage == math.fsum(own[n][o][1] for n, o in found.choice.items())


@given(problems(), st.randoms(use_true_random=False))
def test_neither_the_order_of_items_nor_of_options_matters(problem: tuple[list[Item], int], r: random.Random) -> None:
    items, budget = problem
    turned = []
    for i in items:
        order = list(range(len(i.options)))
        r.shuffle(order)
        o, b, d = (tuple(v[k] for k in order) for v in (i.options, i.bits, i.damages))
        turned.append(Item(i.name, i.kind, i.modules, i.weights, o, b, d))  # type: ignore[arg-type]
    r.shuffle(turned)
    one, other = optimize(items, budget), optimize(turned, budget)
    assert one == other
    assert list(one.choice) == list(other.choice) == sorted(one.choice)


@given(problems(), st.integers(0, 40))
def test_a_floor_is_kept_where_some_choice_keeps_it(problem: tuple[list[Item], int], below: int) -> None:
    items, budget = problem
    floor = max(0, budget - below)
    found = optimize(items, budget, floor)
    wanted = least_damage(items, budget, floor)
    assert found.bits >= floor or wanted is None
    assert same(found.damage, least_damage(items, budget) if wanted is None else wanted)
    assert found.bound <= found.damage


@given(problems())
def test_where_work_ends_early_the_bound_still_holds(problem: tuple[list[Item], int]) -> None:
    items, budget = problem
    best = least_damage(items, budget)
    assert best is not None
    with pytest.MonkeyPatch.context() as m:
        m.setattr(shardq.mixture, "MAX_STATES", 1)
        m.setattr(shardq.mixture, "MAX_STAGES", 2)
        found = optimize(items, budget)
    assert found.bits <= budget
    assert found.bound <= best * (1 + 1e-12) <= found.damage * (1 + 2e-12)
    assert not found.is_proven or same(found.damage, best)


def by_sums(items: Sequence[Item], budget: int) -> float:
    """Another way to the same: a table of all sums of bits, with whole damages."""
    table = {0: 0.0}
    for i in items:
        wider: dict[int, float] = {}
        for (bits, damage), (b, d) in itertools.product(table.items(), zip(i.bits, i.damages, strict=True)):
            if bits + b <= budget and damage + d < wider.get(bits + b, math.inf):
                wider[bits + b] = damage + d
        table = wider
    return min(table.values())


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("kind", ["free", "falling", "correlated"])
def test_larger_problems_agree_with_a_table_of_all_sums(seed: int, kind: str) -> None:
    r = random.Random(seed)
    items = []
    for k in range(60):
        bits = sorted(r.randrange(1, 300) for _ in range(4))
        damages = {
            "free": [r.randrange(10**9) for _ in bits],
            "falling": sorted((r.randrange(10**9) for _ in bits), reverse=True),
            "correlated": [10**4 - 10 * b + r.randrange(8) for b in bits],
        }[kind]
        items.append(item(f"i{k}", bits, [float(d) for d in damages]))
    least, largest = sum(min(i.bits) for i in items), sum(max(i.bits) for i in items)
    budget = r.randrange(least, largest)
    found = optimize(items, budget)
    assert found.damage == by_sums(items, budget)
    assert found.is_proven


def model(count: int, seed: int = 0) -> list[Item]:
    """Items of a few sizes, as layers have them, under 2, 4 and 8 bits."""
    r = random.Random(seed)
    items = []
    for k in range(count):
        weights = r.choice([2**20, 3 * 2**20, 2**22, 2**24])
        scale = weights * math.exp(r.gauss(0, 1.5))
        items.append(item(f"l{k}", [int(weights * b) for b in (2.25, 4.125, 8.125)],
                          [scale * 4.0**-b for b in (2, 4, 8)], weights))  # fmt: skip
    return items


@pytest.mark.parametrize("target", [2.5, 3.0, 4.5, 6.0, 8.0])
def test_a_model_uses_its_budget_to_half_a_percent(target: float) -> None:
    found = choose(model(160), target)
    assert 0.995 * target <= found.average_bits <= target
    assert found.is_proven


def test_twenty_thousand_items_are_proven() -> None:
    found = choose(model(20_000), 4.5)
    assert found.is_proven
    assert 4.4999 < found.average_bits <= 4.5


def test_more_budget_never_harms() -> None:
    items = model(40)
    damages = [optimize(items, find_budget(items, t / 8)).damage for t in range(20, 64)]
    assert damages == sorted(damages, reverse=True)


def test_among_equals_the_first_names_get_the_bits() -> None:
    items = [item(n, (10, 20), (1.0, 0.5)) for n in "dbca"]
    found = optimize(items, 60)
    assert [n for n, o in found.choice.items() if o.name == "o1"] == ["a", "b"]


def test_fixed_items_count_and_stay() -> None:
    items = [item("fixed", (100,), (0.0,)), item("free", (10, 20), (1.0, 0.5))]
    assert optimize(items, 119).choice["free"].name == "o0"
    assert optimize(items, 120).choice["free"].name == "o1"
    assert optimize(items[:1], 100).bits == 100
    assert optimize([], 0).choice == {}


# --- what is refused -------------------------------------------------------------------------


def test_a_budget_below_the_least_names_what_is_possible() -> None:
    items = [item("a", (25, 80), (1.0, 0.0)), item("b", (20, 81), (1.0, 0.0))]
    with pytest.raises(BadOption, match=r"44 bits \(2\.2000 for each weight\).*from 2\.2500 to 8\.0500"):
        optimize(items, 44)
    assert optimize(items, 45).bits == 45


@pytest.mark.parametrize("target", [2.2, 8.2, math.nan, math.inf, -1.0])
def test_a_target_that_cannot_be_met_names_what_can(target: float) -> None:
    items = [item("a", (25, 80), (1.0, 0.0)), item("b", (20, 81), (1.0, 0.0))]
    with pytest.raises(BadOption, match=r"from 2\.2500 to 8\.0500"):
        find_budget(items, target)


def test_budgets_are_rounded_down() -> None:
    assert find_budget([item("a", (40, 60), (1.0, 0.0), weights=11)], 4.3) == 47
    with pytest.raises(BadOption, match="nothing to choose"):
        find_budget([], 4.5)


@pytest.mark.parametrize("bad", [((1,), (math.nan,)), ((1,), (math.inf,)), ((1,), (-1.0,)), ((-1,), (0.0,)), ((), ())])
def test_values_that_cannot_be_weighed_are_refused(bad: tuple[tuple[int, ...], tuple[float, ...]]) -> None:
    with pytest.raises(BadOption, match="broken"):
        item("broken", *bad)
    with pytest.raises(BadOption, match="two items are called a"):
        optimize([item("a", (1,), (0.0,))] * 2, 10)


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


# --- every machine, every run ----------------------------------------------------------------

SCRIPT = """
import sys
import shardq.mixture, shardq.mixture_file
assert "numpy" not in sys.modules
from shardq.mixture import Item, Option, choose
items = [Item(f"m.{k}.w", "w", (f"m.{k}.w",), 10, tuple(Option(f"o{i}", None) for i in range(3)), (20, 40, 80),
              (9.0 * (1 + k % 5), 3.0, 1.0)) for k in {*range(50)}]
print(shardq.mixture_file.layer_config_text(items, choose(items, 4.5)))
"""


def test_hash_seeds_do_not_matter_and_planning_needs_no_numpy() -> None:
    texts = {
        subprocess.run([sys.executable, "-P", "-c", SCRIPT], env={**os.environ, "PYTHONHASHSEED": seed}, check=True,
                       capture_output=True, text=True).stdout for seed in ("1", "2")
    }  # fmt: skip
    assert len(texts) == 1
    assert "# Mixed precision" in texts.pop()
