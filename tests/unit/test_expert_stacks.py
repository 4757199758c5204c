"""Expert stacks: where every matrix of every expert lies, from headers alone. All dimensions are pairwise distinct."""

import gzip
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from shardq.checkpoint import TensorRef
from shardq.errors import UnsupportedSource
from shardq.families import load_families
from shardq.halves import holds_halves
from shardq.recipe import make_recipe
from shardq.roles import assign_roles
from shardq.stacks import ExpertStack, expert_prefix, find_stacks
from shardq.weights import find_weights

DATA = Path(__file__).parents[1] / "data" / "hub_index"
E, H, I = 6, 40, 56  # experts, hidden size, width of an expert  # noqa: E741
L = "model.layers.0."


def refs(shapes: dict[str, tuple[int, ...] | None], dtype: str | None = "BF16") -> list[TensorRef]:
    return [TensorRef(name, "x", dtype, shape, 0, 0) for name, shape in shapes.items()]


def config(model_type: str, **more: Any) -> dict[str, Any]:
    return {"model_type": model_type, "text_config": {"hidden_size": H, "moe_intermediate_size": I, **more}}


def places(stacks: tuple[ExpertStack, ...], expert: int) -> dict[str, tuple[str, range, int, int, bool]]:
    return {
        m.name: (m.stack, m.lines, m.rows, m.columns, m.transposed)
        for s in stacks
        for m in s.matrices()
        if m.expert == expert
    }


FAMILIES: list[tuple[str, str, str, dict[str, tuple[int, ...]], dict[str, tuple[str, range, bool]]]] = [
    # model type, layout, prefix, stacks, projection -> stack, outputs, transposed
    (
        "qwen3_5_moe", "s_oi", "mlp.experts",
        {"mlp.experts.gate_up_proj": (E, 2 * I, H), "mlp.experts.down_proj": (E, H, I)},
        {"gate_proj": ("gate_up_proj", range(I), False), "up_proj": ("gate_up_proj", range(I, 2 * I), False),
         "down_proj": ("down_proj", range(H), False)},
    ),
    (
        "qwen3_vl_moe", "s_io", "mlp.experts",
        {"mlp.experts.gate_up_proj": (E, H, 2 * I), "mlp.experts.down_proj": (E, I, H)},
        {"gate_proj": ("gate_up_proj", range(I), True), "up_proj": ("gate_up_proj", range(I, 2 * I), True),
         "down_proj": ("down_proj", range(H), True)},
    ),
    (
        "qwen3_vl_moe", "s_oi", "mlp.experts",  # saved again by transformers 5
        {"mlp.experts.gate_up_proj": (E, 2 * I, H), "mlp.experts.down_proj": (E, H, I)},
        {"gate_proj": ("gate_up_proj", range(I), False), "up_proj": ("gate_up_proj", range(I, 2 * I), False),
         "down_proj": ("down_proj", range(H), False)},
    ),
    (
        "llama4", "s_io", "feed_forward.experts",
        {"feed_forward.experts.gate_up_proj": (E, H, 2 * I), "feed_forward.experts.down_proj": (E, I, H)},
        {"gate_proj": ("gate_up_proj", range(I), True), "up_proj": ("gate_up_proj", range(I, 2 * I), True),
         "down_proj": ("down_proj", range(H), True)},
    ),
    (
        "gpt_oss", "s_io_il", "mlp.experts",
        {"mlp.experts.gate_up_proj": (E, H, 2 * I), "mlp.experts.down_proj": (E, I, H)},
        {"gate_proj": ("gate_up_proj", range(0, 2 * I, 2), True), "up_proj": ("gate_up_proj", range(1, 2 * I, 2), True),
         "down_proj": ("down_proj", range(H), True)},
    ),
    (
        "granitemoe", "s_oi", "block_sparse_moe.experts",
        {"block_sparse_moe.input_linear.weight": (E, 2 * I, H), "block_sparse_moe.output_linear.weight": (E, H, I)},
        {"gate_proj": ("input_linear.weight", range(I), False),
         "up_proj": ("input_linear.weight", range(I, 2 * I), False),
         "down_proj": ("output_linear.weight", range(H), False)},
    ),
    (
        "step3p5", "s_sep", "moe.experts",
        {"moe.gate_proj.weight": (E, I, H), "moe.up_proj.weight": (E, I, H), "moe.down_proj.weight": (E, H, I)},
        {"gate_proj": ("gate_proj.weight", range(I), False), "up_proj": ("up_proj.weight", range(I), False),
         "down_proj": ("down_proj.weight", range(H), False)},
    ),
    (
        "inkling_mm_model", "s_oi_il", "mlp.experts",
        {"mlp.experts.w13_weight": (E, 2 * I, H), "mlp.experts.w2_weight": (E, H, I)},
        {"w1": ("w13_weight", range(0, 2 * I, 2), False), "w3": ("w13_weight", range(1, 2 * I, 2), False),
         "w2": ("w2_weight", range(H), False)},
    ),
    (
        "inkling_mm_model", "s_oi_il", "mlp.shared_experts",
        {"mlp.shared_experts.shared_w13_weight": (2, 2 * I, H), "mlp.shared_experts.shared_w2_weight": (2, H, I)},
        {"w1": ("shared_w13_weight", range(0, 2 * I, 2), False), "w3": ("shared_w13_weight", range(1, 2 * I, 2), False),
         "w2": ("shared_w2_weight", range(H), False)},
    ),
    (
        "aria", "s_io", "mlp.experts",
        {"mlp.experts.fc1.weight": (E, H, 2 * I), "mlp.experts.fc2.weight": (E, I, H)},
        {"gate_proj": ("fc1.weight", range(I), True), "up_proj": ("fc1.weight", range(I, 2 * I), True),
         "down_proj": ("fc2.weight", range(H), True)},
    ),
    (
        "mistral4", "s_oi", "mlp.experts",
        {"mlp.experts.gate_up_proj": (E, 2 * I, H), "mlp.experts.down_proj": (E, H, I)},
        {"gate_proj": ("gate_up_proj", range(I), False), "up_proj": ("gate_up_proj", range(I, 2 * I), False),
         "down_proj": ("down_proj", range(H), False)},
    ),
    (
        "gemma4", "s_oi", "experts",
        {"experts.gate_up_proj": (E, 2 * I, H), "experts.down_proj": (E, H, I)},
        {"gate_proj": ("gate_up_proj", range(I), False), "up_proj": ("gate_up_proj", range(I, 2 * I), False),
         "down_proj": ("down_proj", range(H), False)},
    ),
    (
        "nemotron_h", "s_sep", "mixer.experts",
        {"mixer.experts.up_proj": (E, I, H), "mixer.experts.down_proj": (E, H, I)},
        {"up_proj": ("up_proj", range(I), False), "down_proj": ("down_proj", range(H), False)},
    ),
]  # fmt: skip


@pytest.mark.parametrize(("model_type", "layout", "prefix", "shapes", "expected"), FAMILIES)
def test_every_matrix_is_placed(
    model_type: str,
    layout: str,
    prefix: str,
    shapes: dict[str, tuple[int, ...]],
    expected: dict[str, tuple[str, range, bool]],
) -> None:
    stacks = find_stacks(refs({L + n: s for n, s in shapes.items()}), config(model_type))
    assert [s.tensor for s in stacks] == [L + n for n in shapes]
    assert {s.layout for s in stacks} == {layout}
    assert {s.emit for s in stacks} == {"stacked" if model_type.startswith("inkling") else "per_expert"}
    experts = next(iter(shapes.values()))[0]
    assert sum(len(list(s.matrices())) for s in stacks) == experts * len(expected)
    got = places(stacks, expert=1)
    assert set(got) == {f"{L}{prefix}.1.{projection}.weight" for projection in expected}
    for projection, (stack, lines, transposed) in expected.items():
        tensor, found, rows, columns, found_transposed = got[f"{L}{prefix}.1.{projection}.weight"]
        assert tensor.endswith(stack)
        assert (found, found_transposed) == (lines, transposed)
        assert (rows, columns) == ((H, I) if projection in ("down_proj", "w2") else (I, H))


def test_biases_follow_their_matrices() -> None:
    p = L + "mlp.experts."
    shapes = {
        p + "gate_up_proj": (E, H, 2 * I), p + "gate_up_proj_bias": (E, 2 * I),
        p + "down_proj": (E, I, H), p + "down_proj_bias": (E, H),
    }  # fmt: skip
    stacks = find_stacks(refs(shapes), config("gpt_oss"))
    biases = {b.name: (b.stack, b.lines) for s in stacks for b in s.biases() if b.expert == 5}
    assert biases == {
        p + "5.gate_proj.bias": (p + "gate_up_proj_bias", range(0, 2 * I, 2)),
        p + "5.up_proj.bias": (p + "gate_up_proj_bias", range(1, 2 * I, 2)),
        p + "5.down_proj.bias": (p + "down_proj_bias", range(H)),
    }
    shapes[p + "down_proj_bias"] = (E, I)
    with pytest.raises(UnsupportedSource, match=r"expert bias .*down_proj_bias is \(6, 56\): expected \(6, 40\)"):
        find_stacks(refs(shapes), config("gpt_oss"))


def test_halves_are_rows_as_they_lie() -> None:
    """For readers that cut a stack in two without a look at its rows."""
    p = L + "mlp.experts."
    shapes = {p + "gate_up_proj": (E, H, 2 * I), p + "gate_up_proj_bias": (E, 2 * I), p + "down_proj": (E, I, H)}
    gate_up, down = find_stacks(refs(shapes), config("gpt_oss"), halves=True)
    assert [(m.name, m.lines) for m in gate_up.matrices()][:2] == [
        (p + "0.gate_proj.weight", range(I)), (p + "0.up_proj.weight", range(I, 2 * I)),
    ]  # fmt: skip
    assert [b.lines for b in gate_up.biases()][:2] == [range(I), range(I, 2 * I)]
    assert next(down.matrices()).lines == range(H)
    shapes = {p + "gate_up_proj": (E, 2 * I, H), p + "down_proj": (E, H, I)}
    assert find_stacks(refs(shapes), config("mistral4"), halves=True) == find_stacks(refs(shapes), config("mistral4"))


@pytest.mark.parametrize(
    ("method", "halves"),
    [("gptq", True), ("awq", True), ("compressed-tensors", False), ("auto-round", False), ("", False)],
)
def test_the_method_of_a_checkpoint_tells_halves(method: str, halves: bool) -> None:
    assert holds_halves({"quantization_config": {"quant_method": method}}) == halves
    assert not holds_halves(None)


def test_codes_are_described_like_their_weights() -> None:
    """Packed codes are [out, in], and the partner tells how many inputs there are; FP8 codes have their own shape."""
    p = L + "mlp.experts."
    blocks = refs({p + "gate_up_proj_blocks": (E, 2 * I, 3, 16), p + "gate_up_proj_scales": (E, 2 * I, 3),
                   p + "down_proj_blocks": (E, 96, 4, 16), p + "down_proj_scales": (E, 96, 4)}, "U8")  # fmt: skip
    gate_up, down = find_stacks(blocks, config("gpt_oss"))
    assert (gate_up.layout, gate_up.columns, gate_up.weight) == ("s_oi_il", 96, p + "gate_up_proj")
    assert (down.columns, down.tensor) == (I, p + "down_proj_blocks")
    fp8 = [TensorRef(p + n, "x", "F8_E4M3", s, 0, 0)
           for n, s in {"gate_up_proj": (E, 2 * I, H), "down_proj": (E, H, I)}.items()]  # fmt: skip
    scales = refs({p + "gate_up_proj_scale_inv": (E, 1, 1), p + "down_proj_scale_inv": (E, 1, 1)}, "F32")
    assert [(s.layout, s.columns) for s in find_stacks(fp8 + scales, config("mistral4"))] == [("s_oi", H), ("s_oi", I)]


def test_separate_stacks_need_the_sizes_of_the_config() -> None:
    shapes: dict[str, tuple[int, ...] | None] = {
        L + "moe.gate_proj.weight": (E, H, I), L + "moe.up_proj.weight": (E, H, I),
        L + "moe.down_proj.weight": (E, I, H),
    }  # fmt: skip
    assert {s.transposed for s in find_stacks(refs(shapes), config("step3p5"))} == {True}
    with pytest.raises(UnsupportedSource, match=r"as \[out, in\] and as \[in, out\], and the sizes in config.json"):
        find_stacks(refs(shapes), {"model_type": "step3p5"})


REFUSED: list[tuple[str, dict[str, tuple[int, ...] | None], dict[str, Any]]] = [
    ("no known family stacks gate_up_proj in .* alone", {"gate_up_proj": (E, 2 * I, H)}, config("qwen3_5_moe")),
    ("fit no expert", {"gate_up_proj": (E, 2 * I, H), "down_proj": (E, H, I + 1)}, config("qwen3_5_moe")),
    ("expected the same number", {"gate_up_proj": (E, 2 * I, H), "down_proj": (E + 1, H, I)}, config("qwen3_5_moe")),
    ("only the model type tells", {"gate_up_proj": (E, 2 * I, H), "down_proj": (E, H, I)}, {}),
    ("no known family stacks w13, w2", {"w13_weight": (E, 2 * I, H), "w2_weight": (E, H, I)}, config("qwen3_5_moe")),
]


@pytest.mark.parametrize(("message", "shapes", "settings"), REFUSED)
def test_what_does_not_fit_is_refused(message: str, shapes: dict[str, tuple[int, ...]], settings: Any) -> None:
    with pytest.raises(UnsupportedSource, match=message):
        find_stacks(refs({f"{L}mlp.experts.{n}": s for n, s in shapes.items()}), settings)


def test_names_that_loaders_accept() -> None:
    assert expert_prefix("a.block_sparse_moe") == "a.block_sparse_moe.experts"
    assert expert_prefix("a.mlp.switch_mlp") == "a.mlp.experts"
    assert expert_prefix("a.self_attention.experts") == "a.self_attention.experts"


# --- real and recorded headers -----------------------------------------------------------------


def test_gpt_oss_has_2304_matrices() -> None:
    folder = DATA / "gpt-oss-20b"
    shards = json.loads(gzip.decompress((folder / "headers.json.gz").read_bytes()))
    tensors = [TensorRef(n, "x", d, tuple(s), 0, 0) for t in shards.values() for n, (d, s) in t.items()]
    stacks = find_stacks(tensors, json.loads((folder / "config.json").read_text()))
    assert len(stacks) == 48
    assert {s.layout for s in stacks} == {"s_oi_il"}
    assert {s.columns for s in stacks} == {2880}
    matrices = [m for s in stacks for m in s.matrices()]
    assert len({m.name for m in matrices}) == len(matrices) == 2304
    assert {(m.rows, m.columns) for m in matrices} == {(2880, 2880)}
    assert len({b.name for s in stacks for b in s.biases()}) == 2304


def test_qwen3_5_index_has_40_and_40_stacks() -> None:
    """Names as the index of Qwen3.5-35B-A3B has them: fused text layers, an MTP layer with separate experts."""
    p = "model.language_model.layers."
    names = [f"{p}{n}.mlp.experts.{s}_proj" for n in range(40) for s in ("gate_up", "down")]
    mtp = [f"mtp.layers.0.mlp.experts.{e}.{s}_proj.weight" for e in range(256) for s in ("gate", "up", "down")]
    stacks = find_stacks(refs(dict.fromkeys(names + mtp), None), config("qwen3_5_moe"))
    assert Counter(s.tensor.rpartition(".")[2] for s in stacks) == {"gate_up_proj": 40, "down_proj": 40}
    assert [p.projection for p in stacks[0].parts] == ["gate_proj", "up_proj"]
    assert list(stacks[0].matrices()) == []
    shapes = {n: (256, 1024, 2048) if "gate_up" in n else (256, 2048, 512) for n in names}
    known = find_stacks(refs(shapes), {"model_type": "qwen3_5_moe"})
    assert sum(1 for s in known for _ in s.matrices()) == 40 * 256 * 3


def test_without_shapes_names_tell_where_they_can() -> None:
    modules = ("block_sparse_moe.input_linear", "block_sparse_moe.output_linear", "shared_mlp.input_linear", "mlp.fc1")
    names = [f"{L}{m}.weight" for m in modules]
    bare = refs(dict.fromkeys(names), None)
    assert [s.tensor for s in find_stacks(bare, config("granitemoe"))] == names[:2]
    assert [v.role.value for v in assign_roles(bare, None).values()] == ["expert_stack"] * 2 + ["linear"] * 2
    mtp = refs({"mtp.layers.0.mlp.experts.gate_up_proj": None}, None)
    assert [v.role.value for v in assign_roles(mtp, None).values()] == ["mtp"]


CATALOG = json.loads(gzip.decompress((DATA / "catalog.json.gz").read_bytes()))
TRANSPOSED = {"aria", "aria_text", "gpt_oss", "llama4", "llama4_text", "openai_privacy_filter"}


def _stacks_of(model_type: str) -> dict[str, tuple[int, ...]]:
    patterns = CATALOG[model_type]["patterns"]
    return {n.replace("#", "0"): tuple(shape) for n, (owner, shape, _) in patterns.items()
            if len(shape) == 3 and re.fullmatch(r"Param:\w*(Experts|MoE)", owner)}  # fmt: skip


def test_catalog_matrices_are_never_stacks_by_name() -> None:
    experts = load_families().experts
    names = [(n, shape) for entry in CATALOG.values() for n, (_, shape, _) in entry["patterns"].items()]
    assert [n for n, shape in names if len(shape) < 3 and experts.is_stack(n, None) and not n.endswith("bias")] == []


@pytest.mark.parametrize("model_type", [t for t in CATALOG if _stacks_of(t)])
def test_catalog_stacks_are_all_found(model_type: str) -> None:
    patterns = CATALOG[model_type]["patterns"]
    every = {n.replace("#", "0"): tuple(shape) for n, (_, shape, _) in patterns.items()}
    tables = [shape for owner, shape, _ in patterns.values() if owner == "Embedding"]
    settings = {"model_type": model_type, "hidden_size": max(tables)[1]}
    stacks = find_stacks(refs(every), settings)
    assert {s.tensor for s in stacks} == set(_stacks_of(model_type))
    assert {s.transposed for s in stacks} == {model_type in TRANSPOSED}
    bare = assign_roles(refs(dict.fromkeys(every), None), settings)
    sure = {n for n, v in bare.items() if v.role.value == "expert_stack"}
    assert sure == {n for n in _stacks_of(model_type) if ".mlp.input_linear" not in n and ".mlp.output_linear" not in n}
    for s in stacks:
        shape = every[s.tensor]
        outputs = sum(len(p.lines) for p in s.parts)
        assert (s.experts, *((s.columns, outputs) if s.transposed else (outputs, s.columns))) == shape


@pytest.mark.parametrize("model_type", [t for t in CATALOG if _stacks_of(t)])
def test_catalog_stacks_become_matrices(model_type: str, make_checkpoint: Any) -> None:
    """All that a type has goes through as weights: experts as matrices [out, in], the rest as it is."""
    patterns = CATALOG[model_type]["patterns"]
    every = {n.replace("#", "0"): tuple(shape) for n, (_, shape, _) in patterns.items()}
    hidden = max(shape for owner, shape, _ in patterns.values() if owner == "Embedding")[1]
    settings = {"model_type": model_type, "hidden_size": hidden, "vocab_size": 0}
    source = make_checkpoint({"a.safetensors": {n: ("BF16", s) for n, s in every.items()}}, settings)
    recipe = make_recipe("W4A16")
    weights = find_weights(source, recipe)
    stacks = {s.weight: s for s in find_stacks(refs(every), settings)}
    split = {s.tensor for s in weights.stacks}
    assert split == {n for n in stacks if assign_roles(refs(every), settings)[n].role.value == "expert_stack"}
    assert every.keys() == (every.keys() & weights.tensors.keys()) | weights.absorbed.keys()
    assert {n for n, a in weights.absorbed.items() if a.fate == "split"} >= split
    made = {n: t for n, t in weights.tensors.items() if n not in every}
    roles = assign_roles(made.values(), settings)
    assert {roles[n].role.value for n, t in made.items() if len(t.shape or ()) == 2} == {"linear"}
    matrices = [m for s in weights.stacks if s.emit == "per_expert" for m in s.matrices()]
    for m in matrices:
        t = made[m.name]
        assert t.shape == (m.rows, m.columns)
        plain = not m.transposed and m.lines.step == 1
        assert (t.encoded == ()) == plain
        assert plain or (t.encoded[0].transposed, t.encoded[0].span) == (m.transposed, m.lines)
    whole = [f"{s.weight}.{e}.weight" for s in weights.stacks if s.emit == "stacked" for e in range(s.experts or 0)]
    assert made.keys() >= {*whole, *(m.name for m in matrices)}
    assert sum(len(t.shape or ()) == 2 for t in made.values()) == len(matrices) + len(whole)
