"""Single verdicts of the default rule, its traps, and properties over made-up names."""

import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardq.checkpoint import TensorRef
from shardq.families import load_families
from shardq.roles import Role, Verdict, assign_roles

CONFIG: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "text_config": {"vocab_size": 1000, "num_experts": 64, "num_hidden_layers": 24},
    "vision_config": {"num_hidden_layers": 40, "vocab_size": None},
}


def _ref(name: str, shape: tuple[int, ...] | None = (512, 512), dtype: str | None = "BF16") -> TensorRef:
    return TensorRef(name, "x", dtype, shape, 0, 0)


def _verdict(
    name: str,
    shape: tuple[int, ...] | None = (512, 512),
    dtype: str | None = "BF16",
    config: dict[str, Any] | None = CONFIG,
) -> tuple[str, str]:
    verdict = assign_roles([_ref(name, shape, dtype)], config)[name]
    return verdict.role.value, verdict.rule


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("model.layers.0.self_attn.q_proj.weight", (512, 512), ("linear", "default")),
        ("model.layers.0.mlp.experts.63.down_proj.weight", (512, 64), ("linear", "default")),
        ("model.layers.0.mlp.shared_expert.gate_proj.weight", (64, 512), ("linear", "default")),
        ("layers.0.attn.wq_a.weight", (512, 512), ("linear", "default")),
        ("transformer_blocks.0.ff.net.2.weight", (512, 512), ("linear", "default")),
        ("model.layers.0.self_attn.q_proj.bias", (512,), ("vector", "ndim")),
        ("model.layers.0.input_layernorm.weight", (512,), ("norm", "ndim")),
        ("model.layers.0.mamba.norm.weight", (8, 512), ("norm", "norm")),
        ("transformer.h.0.ln_1.weight", (64, 512), ("norm", "norm")),
        ("logit_scale", (), ("vector", "ndim")),
        ("model.layers.0.mamba.A_log", (512, 64), ("buffer", "leaf")),
        ("layers.0.hc_attn_fn", (64, 512), ("buffer", "leaf")),
        ("lm_head.weight", (999, 512), ("head", "head")),
        ("output.weight", (999, 512), ("head", "head")),
        ("proj_out.weight", (1000, 512), ("head", "vocab")),
        ("transformer.w.weight", (1000, 512), ("embedding", "vocab")),
        ("medusa_head.0.1.weight", (1000, 512), ("embedding", "vocab")),
        ("model.layers.0.mlp.up_proj.weight", (1000, 512), ("linear", "default")),
        ("model.embed_tokens.weight", (64, 512), ("embedding", "embed")),
        ("model.layers.0.embed.0.weight", (512, 512), ("embedding", "embed")),
        ("wte.weight", (64, 512), ("embedding", "embed")),
        ("model.layers.0.mixer.conv1d.weight", (512, 1, 4), ("conv", "keep_3d:conv")),
        ("model.layers.0.mixer.conv_out.weight", (512, 512), ("conv", "conv")),
        ("patch.weight", (512, 3, 14, 14), ("conv", "ndim")),
        ("model.layers.0.mlp.gate.weight", (64, 512), ("router", "router")),
        ("model.layers.0.mlp.gate.wg.weight", (64, 512), ("router", "router")),
        ("model.layers.0.mlp.shared_expert_gate.weight", (1, 512), ("router", "router")),
        ("model.layers.0.router.classifier.weight", (70, 512), ("router", "router")),
        ("model.layers.0.mlp.selector.weight", (64, 512), ("router", "router_shape")),
        ("model.layers.0.mlp.c_proj.weight", (64, 512), ("linear", "default")),
        ("layers.0.attn.indexer.compressor.wkv.weight", (64, 512), ("small", "small")),
        ("mtp.layers.0.self_attn.q_proj.weight", (512, 512), ("mtp", "mtp")),
        ("model.layers.24.eh_proj.weight", (512, 512), ("mtp", "mtp")),
        ("model.layers.24.mlp.up_proj.weight", (512, 512), ("mtp", "mtp_index")),
        ("model.layers.23.mlp.up_proj.weight", (512, 512), ("linear", "default")),
        ("model.visual.blocks.0.mlp.fc1.weight", (512, 512), ("nontext", "nontext")),
        ("model.vision_tower.layers.30.fc1.weight", (512, 512), ("nontext", "nontext")),
        ("mlp1.1.weight", (512, 512), ("outside_block", "noblock")),
        ("model.pooler.dense.weight", (512, 512), ("outside_block", "noblock")),
        ("model.layers.0.linear_attn.in_proj_ba.weight", (64, 512), ("small", "small")),
        ("model.layers.0.self_attn.g_proj.weight", (96, 4096), ("small", "small")),
        ("model.layers.0.self_attn.g_proj.weight", (12288, 7168), ("linear", "default")),
        ("model.layers.0.attn.q_proj.weight", (16, 512), ("small", "min_dim")),
        ("model.layers.0.mlp.experts.gate_up_proj", (8, 64, 32), ("expert_stack", "experts")),
        ("model.layers.0.moe.up_proj.weight", (8, 64, 32), ("expert_stack", "experts")),
        ("model.layers.0.mlp.experts.w13_weight", (8, 64, 32), ("expert_stack", "experts")),
        ("mtp.layers.0.mlp.experts.gate_up_proj", (8, 64, 32), ("mtp", "mtp")),
        ("talker.layers.0.mlp.experts.down_proj", (8, 64, 32), ("nontext", "nontext")),
        ("layer.0.rel_attn.q", (64, 4, 16), ("buffer", "keep_3d:rel_attn")),
        ("encoder.cls_token", (1, 1, 64), ("embedding", "keep_3d:probe")),
        ("encoder.layers.0.layer_scale", (64, 1, 1), ("conv", "unit_dim")),
        ("model.layers.0.mlp.mixture.weight", (8, 64, 32), ("unknown", "ndim")),
        ("stacked.weight", (8, 64, 32), ("unknown", "ndim")),
    ],
)
def test_verdict(name: str, shape: tuple[int, ...], expected: tuple[str, str]) -> None:
    assert _verdict(name, shape) == expected


@pytest.mark.parametrize("dtype", ["I64", "I32", "U8", "BOOL"])
def test_verdict_integers_are_buffers(dtype: str) -> None:
    assert _verdict("layers.0.ffn.gate.tid2eid", (1000, 6), dtype) == ("buffer", "dtype")


@pytest.mark.parametrize("dtype", ["I8", "U8", "I32", "U32", "F8_E4M3", "F4"])
def test_verdict_low_precision_weight_without_scale_is_unknown(dtype: str) -> None:
    assert _verdict("layers.0.ffn.w1.weight", (512, 512), dtype) == ("unknown", "dtype")


def test_verdict_without_shapes_goes_by_name() -> None:
    def bare(name: str) -> tuple[str, str]:
        return _verdict(name, None, None)

    assert bare("model.layers.0.mlp.up_proj.weight") == ("linear", "default")
    assert bare("model.layers.0.mlp.up_proj.bias") == ("vector", "leaf")
    assert bare("model.layers.0.mlp.experts.gate_up_proj") == ("expert_stack", "experts")
    assert bare("model.layers.0.mlp.gate.weight") == ("router", "router")
    assert bare("model.layers.24.mlp.up_proj.weight") == ("mtp", "mtp_index")
    assert bare("model.layers.0.self_attn.g_proj.weight") == ("linear", "default")


# --- GPT-2's transposed weights ----------------------------------------------------------------


@pytest.mark.parametrize("config", [{"model_type": "gpt2"}, {"text_config": {"model_type": "imagegpt"}}])
def test_transposed_by_model_type(config: dict[str, Any]) -> None:
    name = "transformer.h.0.attn.c_proj.weight"
    assert _verdict(name, (512, 512), config=config) == ("transposed", "family:gpt2")


def test_transposed_by_a_wide_member_of_the_family() -> None:
    refs = [
        _ref("h.0.mlp.c_fc.weight", (512, 2048)),
        _ref("h.0.mlp.c_proj.weight", (2048, 512)),
        _ref("h.0.mlp.other.weight", (512, 512)),
    ]
    roles = [v.role for v in assign_roles(refs, {"model_type": "homemade"}).values()]
    assert roles == [Role.TRANSPOSED, Role.TRANSPOSED, Role.LINEAR]


def test_transposed_spares_linears_of_the_same_name() -> None:
    refs = [_ref("h.0.attn.c_attn.weight", (1536, 512)), _ref("h.0.attn.c_proj.weight", (512, 512))]
    for config in (None, {"model_type": "qwen"}):
        assert {v.role for v in assign_roles(refs, config).values()} == {Role.LINEAR}


# --- config ------------------------------------------------------------------------------------


def test_config_layers_prefer_the_text_part() -> None:
    name = "model.layers.20.mlp.up_proj.weight"
    deep = {"thinker_config": {"text_config": {"num_hidden_layers": 16}}, "num_hidden_layers": 32}
    assert _verdict(name, config=deep) == ("mtp", "mtp_index")
    assert _verdict(name, config={"num_hidden_layers": 16}) == ("mtp", "mtp_index")
    assert _verdict(name, config={"n_layer": 21}) == ("linear", "default")
    assert _verdict(name, config={"vision_config": {"num_hidden_layers": 4}}) == (
        "linear",
        "default",
    )
    # LongCat: `num_layers` pairs, twice as many attentions
    assert _verdict(name, config={"num_layers": 14, "num_hidden_layers": 28})[0] == "linear"


def test_config_takes_several_vocabularies() -> None:
    config = {"vocab_size": 1000, "audio": {"padded_vocab_size": 1024}, "novocab_size": 512}
    assert _verdict("a.w.weight", (1000, 64), config=config)[1] == "vocab"
    assert _verdict("a.w.weight", (1024, 64), config=config)[1] == "vocab"
    assert _verdict("a.w.weight", (512, 64), config=config)[1] == "noblock"


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["vocab_size", "num_experts", "num_hidden_layers", "text_config", "model_type", "x"]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from(["vocab_size", "num_hidden_layers", "text_config"]), _JSON))
def test_config_of_any_type_is_tolerated(config: dict[str, Any]) -> None:
    role, rule = _verdict("model.layers.0.mlp.up_proj.weight", config=config)
    assert (role, rule) == ("linear", "default")


# --- properties --------------------------------------------------------------------------------

# Letters that build no word that a rule knows.
_FILLER = st.text("jkqz", min_size=1, max_size=3)


@settings(deadline=None)
@given(
    word=st.sampled_from(sorted(load_families().names.head)),
    before=_FILLER,
    after=_FILLER,
    place=st.integers(0, 3),
)
def test_head_words_inside_segments_are_no_heads(word: str, before: str, after: str, place: int) -> None:
    """`attention.output.dense`, `multi_head_attention.q_proj`, `head_proj`, ... are Linear."""
    names = (
        f"model.layers.0.attention.{word}.dense.weight",
        f"model.layers.0.{before}_{word}_{after}.q_proj.weight",
        f"model.layers.0.attn.{word}_{after}.weight",
        f"model.layers.0.attn.{before}_{word}.weight",
    )
    expected = ("linear", "default")
    if "embed" in word and place >= 2:  # `embed` in the last segment means a table
        expected = ("embedding", "embed")
    assert _verdict(names[place]) == expected


@pytest.mark.parametrize(
    "name",
    [
        "encoder.layer.0.attention.output.dense.weight",
        "layers.0.multi_head_attention.q_proj.weight",
        "layers.0.mlp.head_proj.weight",
        "layers.0.mlp.output_gate.weight",
        "layers.0.mlp.output_linear.weight",
        "layers.0.mlp.gate_proj.weight",
        "layers.0.mlp.gate_up_proj.weight",
        "layers.0.scoreboard.weight",
        "layers.0.reimage.q_proj.weight",
    ],
)
def test_traps_are_linear(name: str) -> None:
    assert _verdict(name, (512, 768)) == ("linear", "default")


_SEGMENT = st.sampled_from(
    re.findall(
        r"\S+",
        """
        model layers h blocks 0 1 7 23 24 31 mlp attn gate experts router w1 w2 up_proj g_proj
        output head lm_head embed norm conv mtp visual dense indexer c_fc c_attn moe in_proj_a
        down_proj
        """,
    )
)
_NAME = st.builds(
    lambda segments, leaf: ".".join([*segments, leaf]),
    st.lists(_SEGMENT, max_size=6),
    st.sampled_from(["weight", "weight", "weight", "bias", "A_log", "down_proj", "w13_weight"]),
)
_TENSORS = st.lists(
    st.builds(
        _ref,
        _NAME,
        st.none() | st.lists(st.sampled_from([1, 16, 64, 200, 512, 1000]), max_size=5).map(tuple),
        st.sampled_from([None, "BF16", "F32", "F16", "I64", "I32", "F8_E4M3", "BOOL"]),
    ),
    max_size=12,
    unique_by=lambda ref: ref.name,
)


@settings(deadline=None)
@given(_TENSORS)
def test_picks_are_always_matrices_in_a_block(refs: list[TensorRef]) -> None:
    verdicts = assign_roles(refs, CONFIG)
    assert list(verdicts) == [ref.name for ref in refs]
    for ref in refs:
        if verdicts[ref.name].role is Role.LINEAR:
            assert ref.dtype in (None, "BF16", "F32", "F16")
            assert ref.shape is None or (len(ref.shape) == 2 and min(ref.shape) >= 32)
            assert ref.name.endswith(".weight")
            assert re.search(r"(^|\.)\d+\.", ref.module)


@settings(deadline=None)
@given(_TENSORS, st.randoms(use_true_random=False))
def test_verdicts_do_not_depend_on_neighbours_or_order(refs: list[TensorRef], random: Any) -> None:
    """Verdicts are shared between layers; sharing must not change any."""
    # Left out: the names by which a family is recognised from all tensors together.
    plain = [ref for ref in refs if "c_fc" not in ref.name and "c_attn" not in ref.name]
    together = assign_roles(plain, CONFIG)
    shuffled = list(plain)
    random.shuffle(shuffled)
    assert assign_roles(shuffled, CONFIG) == together
    for ref in plain:
        assert assign_roles([ref], CONFIG) == {ref.name: together[ref.name]}


def test_layers_of_one_name_differ_by_shape_dtype_and_index() -> None:
    def up(layer: int) -> str:
        return f"model.layers.{layer}.mlp.up_proj.weight"

    refs = [_ref(up(0)), _ref(up(1), (16, 512)), _ref(up(2), dtype="I64"), _ref(up(24))]
    rules = [verdict.rule for verdict in assign_roles(refs, CONFIG).values()]
    assert rules == ["default", "min_dim", "dtype", "mtp_index"]


def test_no_tensors_no_verdicts() -> None:
    empty: dict[str, Verdict] = {}
    assert assign_roles([], None) == empty
