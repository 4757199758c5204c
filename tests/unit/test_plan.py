import itertools
import pickle
from typing import Any

import pytest

from shardq.errors import LayoutRefuses
from shardq.files.safetensors import parse_header
from shardq.needs import shard_costs
from shardq.onepass import OnePass
from shardq.plans import make_plan
from shardq.recipe import make_recipe
from shardq.tasks import SLAB_BYTES, CopyTask, QuantizeTask

CONFIG = {"num_hidden_layers": 1, "vocab_size": 512}
BF16 = "BF16"


def checkpoint(make_checkpoint: Any, rows: int = 256) -> Any:
    return make_checkpoint(
        {
            "b.safetensors": {
                "model.layers.0.mlp.up_proj.weight": (BF16, (rows, 1024)),
                "model.layers.0.mlp.up_proj.bias": (BF16, (rows,)),
                "empty": ("F32", (0, 4)),
            },
            "a.safetensors": {"model.embed_tokens.weight": (BF16, (512, 256)), "step": ("I64", ())},
        },
        CONFIG,
    )


def test_plans_are_equal_for_equal_input(make_checkpoint: Any) -> None:
    one = make_plan(checkpoint(make_checkpoint), make_recipe("W4A16"))
    two = make_plan(checkpoint(make_checkpoint), make_recipe("W4A16"))
    assert one == two
    assert one.fingerprint == two.fingerprint
    assert one.fingerprint != make_plan(checkpoint(make_checkpoint), make_recipe("W8A16")).fingerprint


def test_headers_are_valid_and_hold_every_output(make_checkpoint: Any) -> None:
    plan = make_plan(checkpoint(make_checkpoint), make_recipe("W4A16@gptq"))
    names = []
    for f in plan.files:
        header = parse_header(f.header, f.size_bytes, f.name)
        names += [t.name for t in header.tensors]
        assert header.metadata == {"format": "pt"}
    module = "model.layers.0.mlp.up_proj"
    assert sorted(names) == sorted(
        [f"{module}.{s}" for s in ("qweight", "qzeros", "scales", "g_idx", "bias")]
        + ["model.embed_tokens.weight", "step", "empty"]
    )


def test_giants_are_cut_into_slabs_that_cover_every_row_once(make_checkpoint: Any) -> None:
    rows = 3 * SLAB_BYTES // 2048 + 32
    plan = make_plan(checkpoint(make_checkpoint, rows), make_recipe("W4A16"))
    slabs = [t for t in plan.tasks if isinstance(t, QuantizeTask)]
    assert len(slabs) == 4
    covered = sorted((t.row, t.end_row) for t in slabs)
    assert covered[0][0] == 0
    assert covered[-1][1] == rows
    assert all(a[1] == b[0] and a[1] % 32 == 0 for a, b in itertools.pairwise(covered))
    assert all(t.source_bytes <= SLAB_BYTES for t in slabs)


def test_copies_cover_every_kept_byte_once(make_checkpoint: Any) -> None:
    plan = make_plan(checkpoint(make_checkpoint), make_recipe("W4A16"))
    copied = sum(p.size_bytes for t in plan.tasks if isinstance(t, CopyTask) for p in t.pieces)
    kept = sum(d.tensor.size_bytes for d in plan.decisions if d.action == "copy")
    assert copied == kept == 512 * 256 * 2 + 8 + 256 * 2


def test_tasks_are_small_messages(make_checkpoint: Any) -> None:
    many = {f"model.layers.0.norm{i}.weight": (BF16, (256,)) for i in range(300)}
    big = make_checkpoint(
        {"a.safetensors": {"model.layers.0.mlp.up_proj.weight": (BF16, (256, 1024)), **many}},
        CONFIG,
    )
    plan = make_plan(big, make_recipe("W4A16"))
    assert max(len(pickle.dumps(t)) for t in plan.tasks) < 8192
    assert [t.id for t in plan.tasks] == list(range(len(plan.tasks)))


QWEN = {"num_hidden_layers": 1, "vocab_size": 512, "model_type": "qwen3_moe", "num_experts": 2}


def experts(make_checkpoint: Any, prefix: str = "model-") -> Any:
    """Two experts of one layer, q/k/v beside them, spread over three shards: an expert, and q from k."""
    attention = {f"model.layers.0.self_attn.{m}_proj.weight": (BF16, (64, 64)) for m in "qkvo"}
    stacks = {
        f"model.layers.0.mlp.experts.{e}.{m}.weight": (BF16, shape)
        for e in (0, 1)
        for m, shape in (("gate_proj", (128, 64)), ("up_proj", (128, 64)), ("down_proj", (64, 128)))
    }
    names = sorted({**attention, **stacks})
    every = {**attention, **stacks, "model.embed_tokens.weight": (BF16, (512, 64))}
    thirds = (names[:4], names[4:8], [*names[8:], "model.embed_tokens.weight"])
    shards = {f"{prefix}{n}.safetensors": {name: every[name] for name in third} for n, third in enumerate(thirds, 1)}
    return make_checkpoint(shards, QWEN)


def test_a_scale_reaches_over_the_fused_group_wherever_its_members_are(make_checkpoint: Any) -> None:
    plan = make_plan(experts(make_checkpoint), make_recipe("NVFP4A16"))
    attention = "model.layers.0.self_attn."
    assert plan.reaches[f"{attention}q_proj.weight"] == tuple(f"{attention}{m}_proj.weight" for m in "qkv")
    assert plan.reaches[f"{attention}o_proj.weight"] == (f"{attention}o_proj.weight",)
    gate = plan.reaches["model.layers.0.mlp.experts.1.gate_proj.weight"]
    assert gate == tuple(f"model.layers.0.mlp.experts.1.{m}_proj.weight" for m in ("gate", "up"))
    one, two, three = (s.name for s in plan.checkpoint.shards)
    assert [f.shards for f in plan.files] == [(one,), (two, three), (three, two)]  # q waits for k, and k for q
    assert [c.hold for c in shard_costs(OnePass((plan,)), staged=True)] == [0, 1, 0]


def test_stacks_hold_all_experts_in_the_file_of_the_first(make_checkpoint: Any) -> None:
    plan = make_plan(experts(make_checkpoint), make_recipe("W4A16@mlx", group_size=64))
    name = "model.layers.0.mlp.switch_mlp.down_proj.weight"
    first, _, last = plan.files
    assert first.specs[name].shape == (2, 64, 16)
    assert first.shards == ("model-1.safetensors", "model-2.safetensors")  # where the gate of the other expert is
    assert not any("experts" in n for f in plan.files for n in f.specs)
    assert "model.embed_tokens.scales" in last.specs
    tasks = {t.tensor: t for t in plan.tasks if isinstance(t, QuantizeTask)}
    slices = [tasks[f"model.layers.0.mlp.experts.{e}.down_proj.weight"] for e in (0, 1)]
    begin, end = first.offsets[name]
    assert [t.targets[0].begin for t in slices] == [begin, begin + (end - begin) // 2]
    assert {t.file for t in slices} == {first.name}


def test_a_stack_that_is_not_whole_or_files_that_mlx_does_not_find_are_refused(make_checkpoint: Any) -> None:
    part = make_recipe("W4A16@mlx", group_size=64, ignore=["model.layers.0.mlp.experts.1.*"])
    with pytest.raises(LayoutRefuses, match="experts"):
        make_plan(experts(make_checkpoint), part)
    mixed = make_recipe("W4A16@mlx", group_size=64, layer_config={"**.experts.1.down_proj": {"bits": 8}})
    with pytest.raises(LayoutRefuses, match=r"switch_mlp\.down_proj is a stack of 2"):
        make_plan(experts(make_checkpoint), mixed)
    with pytest.raises(LayoutRefuses, match=r"model\*\.safetensors and would not find part-1"):
        make_plan(experts(make_checkpoint, "part-"), make_recipe("W4A16@mlx", group_size=64))


def test_the_cut_depends_on_headers_alone(make_checkpoint: Any) -> None:
    plans = [make_plan(experts(make_checkpoint), make_recipe(s)) for s in ("W4A16G64@gptq", "NVFP4A16", "4bit@mlx")]
    cuts = [[(t.id, t.shard, t.extent) for t in p.tasks] for p in plans]
    assert cuts[0] == cuts[1] == cuts[2]
    work = OnePass(tuple(plans))
    assert [b.extent for b in work.bundles] == [c[2] for c in cuts[0]]
    assert all(len(b.members) == 3 for b in work.bundles)


LISTING = [  # every layout whose configuration says what is not quantized
    ("W4A16", "auto_round"),
    ("W4A16", "gptq"),
    ("W4A16", "awq"),
    ("W4A16", "compressed-tensors"),
    ("FP8_BLOCK", "fp8"),
    ("MXFP8", "fp8"),
]


@pytest.mark.parametrize(("scheme", "layout"), LISTING)
def test_configurations_name_kept_matrices_that_look_like_something_else(
    make_checkpoint: Any, scheme: str, layout: str
) -> None:
    """By its rows or its name a Linear layer may count as a table or a convolution."""
    odd = ("model.layers.0.mlp.fc1", "model.altup_unembed_projections.0", "model.layers.0.conv_out")
    shapes = {f"{odd[0]}.weight": (512, 128), f"{odd[1]}.weight": (128, 128), f"{odd[2]}.weight": (128, 128)}
    linear, table = "model.layers.0.mlp.up_proj", "model.embed_tokens"
    shapes |= {f"{linear}.weight": (128, 128), f"{table}.weight": (512, 128), "model.conv.weight": (128, 128, 3)}
    checkpoint = make_checkpoint({"a.safetensors": {n: (BF16, s) for n, s in shapes.items()}}, CONFIG)
    plan = make_plan(checkpoint, make_recipe(scheme, layout=layout))
    assert {c.module for c in plan.choices()} == {*odd, linear}
    block = plan.layout.config_block(plan.recipe.scheme, plan.choices(), "0")
    assert plan.layout.scheme_of(block, linear) == plan.recipe.scheme
    assert [plan.layout.scheme_of(block, m) for m in odd] == [None] * 3
