"""What a checkpoint stands for: quantized and stacked tensors become weights; what cannot is refused by name."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

import shardq
from shardq.errors import UnsupportedSource
from shardq.plans import Plan, make_plan
from shardq.recipe import Recipe
from shardq.reports import describe_plan
from shardq.weights import Absorbed, find_weights

L = "model.layers.0."
Spec = dict[str, tuple[str, tuple[int, ...]]]
FP8: Spec = {f"{L}mlp.up_proj.weight": ("F8_E4M3", (192, 256)), f"{L}mlp.up_proj.weight_scale_inv": ("F32", (2, 2))}
E, H, I = 4, 64, 96  # experts, hidden size, width of an expert  # noqa: E741


def recipe(**options: Any) -> Recipe:
    return shardq.make_recipe("W4A16", group_size=32, **options)


def config(model_type: str = "llama") -> dict[str, Any]:
    sizes = {"hidden_size": H, "moe_intermediate_size": I, "num_hidden_layers": 1}
    return {"model_type": model_type, "vocab_size": 999, **sizes}


def planned(make: Any, spec: Spec, settings: dict[str, Any] | None = None, **options: Any) -> Plan:
    source = make({"a.safetensors": spec}, settings or config())
    return make_plan(source, recipe(**options))


# --- refusals ----------------------------------------------------------------------------------

REFUSED: list[tuple[str, Spec]] = [
    (r"mlp\.up_proj\.weight in a\.safetensors is a quantized weight \(F8_E4M3 \[192, 256\], .*\) without its scales",
     {f"{L}mlp.up_proj.weight": ("F8_E4M3", (192, 256))}),
    (r"mlp\.up_proj\.weight_scale_inv in a\.safetensors belongs to a quantized weight .* that is not there",
     {f"{L}mlp.up_proj.weight": ("BF16", (192, 256)), f"{L}mlp.up_proj.weight_scale_inv": ("F32", (2, 2))}),
    (r"mlp\.up_proj\.qzeros in a\.safetensors belongs to a quantized weight",
     {f"{L}mlp.up_proj.qzeros": ("I32", (2, 24))}),
    (r"mlp\.up_proj\.weight in a\.safetensors is a quantized weight \(I8",
     {f"{L}mlp.up_proj.weight": ("I8", (192, 256))}),
    (r"mlp\.up_proj\.weight_scale_inv in a\.safetensors is .*\[200, 2\]",
     {f"{L}mlp.up_proj.weight": ("F8_E4M3", (192, 256)), f"{L}mlp.up_proj.weight_scale_inv": ("F32", (200, 2))}),
    (r"gate_up_proj_scales in a\.safetensors belongs to a quantized weight",
     {f"{L}mlp.experts.gate_up_proj_scales": ("U8", (E, 2 * I, H // 32))}),
    (r"mlp\.up_proj\.weight_shape in a\.safetensors says the shape of others and was not read",
     {f"{L}mlp.up_proj.weight_packed": ("I32", (40, 12)), f"{L}mlp.up_proj.weight_scale": ("BF16", (40, 1)),
      f"{L}mlp.up_proj.weight_shape": ("I64", (2,))}),
    (r"mlp\.up_proj\.codebooks in a\.safetensors is of aqlm, which is not read",
     {f"{L}mlp.up_proj.codes": ("I16", (8, 8)), f"{L}mlp.up_proj.codebooks": ("F16", (8, 8))}),
]  # fmt: skip


@pytest.mark.parametrize(("message", "spec"), REFUSED, ids=range(len(REFUSED)))
def test_what_cannot_be_read_is_named_with_its_shard(make_checkpoint: Any, message: str, spec: Spec) -> None:
    with pytest.raises(UnsupportedSource, match=message):
        planned(make_checkpoint, spec | {f"{L}mlp.down_proj.weight": ("BF16", (H, 192))})


def test_many_problems_are_counted(make_checkpoint: Any) -> None:
    spec: Spec = {f"model.layers.{n}.mlp.up_proj.weight": ("F8_E4M3", (192, 256)) for n in range(9)}
    with pytest.raises(UnsupportedSource, match=r"layers\.3\.mlp.*; and 5 more$"):
        planned(make_checkpoint, spec)


def test_a_weight_that_is_there_twice_is_refused(make_checkpoint: Any) -> None:
    codes: Spec = {f"{L}mlp.up_proj.weight_packed": ("U8", (64, 32)), f"{L}mlp.up_proj.weight_scale": ("U8", (64, 2))}
    twice: Spec = {f"{L}mlp.up_proj.weight": ("BF16", (64, 64))}
    source = make_checkpoint({"a.safetensors": codes, "b.safetensors": twice}, config())
    with pytest.raises(UnsupportedSource, match=r"up_proj\.weight is in a.safetensors and, in another form, in b"):
        find_weights(source, recipe())
    stacks: Spec = {
        f"{L}mlp.experts.gate_up_proj": ("BF16", (E, 2 * I, H)),
        f"{L}mlp.experts.down_proj": ("BF16", (E, H, I)),
    }
    single: Spec = {f"{L}mlp.experts.1.up_proj.weight": ("BF16", (I, H))}
    source = make_checkpoint({"a.safetensors": stacks, "b.safetensors": single}, config("qwen3_5_moe"))
    with pytest.raises(UnsupportedSource, match=r"experts\.1\.up_proj\.weight is in a.* in b.safetensors"):
        find_weights(source, recipe())


# --- quantized sources -------------------------------------------------------------------------


def test_codes_and_scales_become_a_weight(make_checkpoint: Any) -> None:
    plan = planned(make_checkpoint, FP8 | {f"{L}mlp.up_proj.input_scale": ("F32", ())})
    (t,) = plan.weights.tensors.values()
    assert (t.name, t.dtype, t.shape) == (f"{L}mlp.up_proj.weight", "BF16", (192, 256))
    assert [(p.role, p.tensor) for p in t.encoded[0].parts] == [
        ("codes", t.name),
        ("scale", f"{t.module}.weight_scale_inv"),
    ]
    assert plan.weights.absorbed[f"{t.module}.weight_scale_inv"] == Absorbed("decoded", t.name, "fp8_block")
    left = plan.weights.absorbed[f"{t.module}.input_scale"]
    assert (left.fate, left.into) == ("dropped", "")
    assert "activations" in left.reason
    assert describe_plan(plan)["absorbed"]["dropped"] == {left.reason: 1}
    assert plan.weights.were_encoded


def test_columns_in_act_order_are_read(make_checkpoint: Any) -> None:
    p = f"{L}mlp.up_proj."
    spec: Spec = {p + "qweight": ("I32", (32, 64)), p + "qzeros": ("I32", (8, 8)), p + "scales": ("F16", (8, 64)),
                  p + "g_idx": ("I32", (256,))}  # fmt: skip
    block = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True}
    plan = planned(make_checkpoint, spec, config() | {"quantization_config": block})
    (t,) = plan.weights.tensors.values()
    assert (t.name, t.shape, t.dtype) == (p + "weight", (64, 256), "F16")
    assert t.encoded[0].part("groups") is not None
    assert {a.into for a in plan.weights.absorbed.values()} == {t.name}
    assert plan.weights.absorbed.keys() == spec.keys()


def test_parts_may_be_in_other_shards(make_checkpoint: Any) -> None:
    weight, scale = FP8
    source = make_checkpoint({"a.safetensors": {weight: FP8[weight]}, "b.safetensors": {scale: FP8[scale]}}, config())
    plan = make_plan(source, recipe())
    assert set(plan.weights.shards_of(weight)) == {"a.safetensors", "b.safetensors"}
    (file,) = plan.files
    assert (file.name, file.shards) == ("a.safetensors", ("a.safetensors", "b.safetensors"))


def test_a_dump_without_content_is_planned_like_an_index(tmp_path: Path) -> None:
    """The shape of NF4 is in a tensor that no dump has."""
    p = f"{L}mlp.up_proj.weight"
    spec = {p: ["U8", [8192, 1]], f"{p}.absmax": ["F32", [256]], f"{p}.quant_map": ["F32", [16]],
            f"{p}.quant_state.bitsandbytes__nf4": ["U8", [90]],
            f"{L}mlp.down_proj.weight": ["BF16", [64, 64]]}  # fmt: skip
    (tmp_path / "headers.json.gz").write_bytes(gzip.compress(json.dumps({"a.safetensors": spec}).encode()))
    (tmp_path / "config.json").write_text(json.dumps(config()))
    plan = shardq.plan_headers(tmp_path, recipe())
    assert plan.weights.tensors[p].shape is None
    assert (len(plan.weights.absorbed), plan.files) == (3, ())
    assert describe_plan(plan)["counts"]["quantized_modules"] == 2


# --- stacks ------------------------------------------------------------------------------------

GPT_OSS: Spec = {
    f"{L}mlp.experts.gate_up_proj": ("BF16", (E, H, 2 * I)), f"{L}mlp.experts.gate_up_proj_bias": ("BF16", (E, 2 * I)),
    f"{L}mlp.experts.down_proj": ("BF16", (E, I, H)), f"{L}mlp.experts.down_proj_bias": ("BF16", (E, H)),
}  # fmt: skip


def test_every_second_bias_is_the_gates(make_checkpoint: Any) -> None:
    plan = planned(make_checkpoint, GPT_OSS, config("gpt_oss"))
    tensors, whole = plan.weights.tensors, plan.checkpoint.tensors[f"{L}mlp.experts.gate_up_proj_bias"]
    gate, up = (tensors[f"{L}mlp.experts.2.{name}_proj.bias"] for name in ("gate", "up"))
    for offset, t in enumerate((gate, up)):
        assert (t.shape, t.encoded[0].pick) == ((I,), (offset, 2 * I, 2))
        reads = t.encoded[0].parts[0]
        assert (reads.tensor, reads.begin) == (whole.name, whole.begin + 2 * 2 * I * 2)
    down = tensors[f"{L}mlp.experts.2.down_proj.bias"]
    assert (down.shape, down.encoded) == ((H,), ())  # consecutive bytes
    assert down.size_bytes == 2 * H
    assert plan.weights.absorbed == {n: Absorbed("split", f"{L}mlp.experts", "gpt_oss") for n in GPT_OSS}
    assert [(s.tensor, s.experts) for s in plan.weights.stacks] == [
        (n, E) for n in (f"{L}mlp.experts.gate_up_proj", f"{L}mlp.experts.down_proj")
    ]


def test_rows_of_a_stack_that_lie_together_need_no_decoding(make_checkpoint: Any) -> None:
    spec: Spec = {
        f"{L}mlp.experts.gate_up_proj": ("BF16", (E, 2 * I, H)),
        f"{L}mlp.experts.down_proj": ("BF16", (E, H, I)),
    }
    plan = planned(make_checkpoint, spec, config("qwen3_5_moe"))
    stack = plan.checkpoint.tensors[f"{L}mlp.experts.gate_up_proj"]
    for expert in range(E):
        for half, name in enumerate(("gate_proj", "up_proj")):
            t = plan.weights.tensors[f"{L}mlp.experts.{expert}.{name}.weight"]
            assert (t.shape, t.encoded) == ((I, H), ())
            assert t.begin == stack.begin + (2 * expert + half) * I * H * 2
            assert t.size_bytes == I * H * 2
    assert not plan.weights.were_encoded
    assert not plan.places


def test_stacks_that_are_kept_stay_whole_and_are_listed(make_checkpoint: Any) -> None:
    others: Spec = {f"{L}self_attn.o_proj.weight": ("BF16", (H, H))}
    plan = planned(make_checkpoint, GPT_OSS | others, config("gpt_oss"), ignore=["**.experts.*"])
    assert plan.weights.tensors.keys() == (GPT_OSS | others).keys()
    assert not plan.weights.absorbed
    assert not plan.weights.stacks
    kept = {c.module for c in plan.choices() if c.scheme is None}
    assert kept == {f"{L}mlp.experts"}
    assert plan.layout.config_block(plan.recipe.scheme, plan.choices(), "0")["extra_config"].keys() == kept


def test_stacks_of_inkling_go_back_into_stacks(make_checkpoint: Any) -> None:
    p = f"{L}mlp.experts."
    spec: Spec = {p + "w13_weight": ("BF16", (E, 2 * I, H)), p + "w2_weight": ("BF16", (E, H, I))}
    plan = planned(make_checkpoint, spec, config("inkling_mm_model"))
    assert list(plan.weights.tensors) == [f"{p}{s}.{e}.weight" for s in ("w13_weight", "w2_weight") for e in range(E)]
    places = {m: (q.module, q.index, q.count) for m, q in plan.places.items()}
    assert places == {f"{p}{s}.{e}": (p + s, e, E) for s in ("w13_weight", "w2_weight") for e in range(E)}
    (file,) = plan.files
    assert file.specs[p + "w13_weight.qweight"].shape == (E, H // 8, 2 * I)
    assert {c.module for c in plan.choices()} == {p + "w13_weight", p + "w2_weight"}
    assert describe_plan(plan)["absorbed"]["split"] == {"inkling": {"stacks": 2, "matrices": 2 * E}}


def test_quantized_stacks_are_decoded_and_split(make_checkpoint: Any) -> None:
    p = f"{L}mlp.experts."
    spec: Spec = {p + "gate_up_proj": ("F8_E4M3", (E, 2 * I, H)), p + "gate_up_proj_scale_inv": ("BF16", (E, 1, 1)),
                  p + "down_proj": ("F8_E4M3", (E, H, I)), p + "down_proj_scale_inv": ("BF16", (E, 1, 1))}  # fmt: skip
    plan = planned(make_checkpoint, spec, config("mistral4"))
    assert len(plan.weights.tensors) == 3 * E
    assert {t.encoded[0].kind for t in plan.weights.tensors.values()} == {"fp8_3d"}
    assert plan.weights.absorbed[p + "down_proj"] == Absorbed("split", f"{L}mlp.experts", "gate_up")
    assert plan.weights.absorbed[p + "down_proj_scale_inv"] == Absorbed("decoded", f"{L}mlp.experts", "fp8_3d")
    counts = describe_plan(plan)["absorbed"]
    assert counts["decoded"] == {"fp8_3d": 2}
    assert counts["split"] == {"gate_up": {"stacks": 2, "matrices": 3 * E}}


def test_plans_of_equal_input_are_equal(make_checkpoint: Any) -> None:
    one, other = (planned(make_checkpoint, GPT_OSS | FP8, config("gpt_oss")) for _ in range(2))
    assert one == other
    assert one.tasks == other.tasks
    assert [t.id for t in one.tasks] == list(range(len(one.tasks)))
