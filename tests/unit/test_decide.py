from dataclasses import replace
from typing import Any

import pytest

from shardq.decide import Decision, decide
from shardq.errors import (
    BadGroupSize,
    BadOption,
    LayoutRefuses,
    NothingToQuantize,
    PatternMatchesNothing,
    ShardqError,
    UnknownTensor,
    UnsupportedSource,
)
from shardq.recipe import make_recipe

CONFIG = {"num_hidden_layers": 2, "vocab_size": 512, "hidden_size": 256, "num_experts": 4}
BF16 = "BF16"


def llama(
    **extra: tuple[str, tuple[int, ...]],
) -> dict[str, dict[str, tuple[str, tuple[int, ...]]]]:
    tensors = {
        "model.embed_tokens.weight": (BF16, (512, 256)),
        "lm_head.weight": (BF16, (512, 256)),
    }
    for i in range(2):
        p = f"model.layers.{i}."
        tensors |= {
            p + "input_layernorm.weight": (BF16, (256,)),
            p + "self_attn.q_proj.weight": (BF16, (256, 256)),
            p + "self_attn.k_proj.weight": (BF16, (128, 256)),
            p + "mlp.gate.weight": (BF16, (4, 256)),
            p + "mlp.down_proj.weight": (BF16, (256, 384)),
        }
    return {"a.safetensors": tensors | extra}


def by_name(decisions: tuple[Decision, ...]) -> dict[str, Decision]:
    return {d.tensor.module: d for d in decisions}


def test_linears_are_quantized_and_the_rest_is_copied(make_checkpoint: Any) -> None:
    got = by_name(decide(make_checkpoint(llama(), CONFIG), make_recipe("W4A16")))
    assert {m for m, d in got.items() if d.action == "quantize"} == {
        f"model.layers.{i}.{m}" for i in range(2) for m in ("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj")
    }
    assert got["model.layers.0.mlp.gate"].rule == "router"
    assert got["lm_head"].role == "head"


def test_ignore_and_include(make_checkpoint: Any) -> None:
    recipe = make_recipe("W4A16", ignore=["model.layers.*.self_attn.*"], include=["lm_head"])
    got = by_name(decide(make_checkpoint(llama(), CONFIG), recipe))
    assert got["model.layers.1.self_attn.q_proj"].rule == "ignore:model.layers.*.self_attn.*"
    assert got["lm_head"].action == "quantize"


def test_exact_layer_config_beats_ignore_and_pattern(make_checkpoint: Any) -> None:
    rules = {
        "re:.*down_proj": {"bits": 8},
        "model.layers.0.mlp.down_proj": {"bits": 2, "group_size": 32},
    }
    recipe = make_recipe("W4A16", layer_config=rules, ignore=["**.down_proj"])
    got = by_name(decide(make_checkpoint(llama(), CONFIG), recipe))
    first, second = got["model.layers.0.mlp.down_proj"], got["model.layers.1.mlp.down_proj"]
    assert first.scheme is not None
    assert first.scheme.name == "W2A16G32"
    assert second.action == "copy"


def test_sixteen_bits_keep(make_checkpoint: Any) -> None:
    recipe = make_recipe("W4A16", layer_config={"**.down_proj": {"bits": 16}})
    got = by_name(decide(make_checkpoint(llama(), CONFIG), recipe))
    assert got["model.layers.0.mlp.down_proj"].rule == "layer_config:**.down_proj"
    assert got["model.layers.0.mlp.down_proj"].action == "copy"


def test_quant_lm_head(make_checkpoint: Any) -> None:
    got = by_name(decide(make_checkpoint(llama(), CONFIG), make_recipe("W4A16", quant_lm_head=True)))
    assert got["lm_head"].scheme == make_recipe("W4A16").scheme


def test_mixed_gives_experts_four_bits(make_checkpoint: Any) -> None:
    name = "model.layers.0.mlp.experts.1.up_proj.weight"
    shared = "model.layers.0.mlp.shared_expert.up_proj.weight"
    checkpoint = make_checkpoint(llama(**{name: (BF16, (128, 256)), shared: (BF16, (128, 256))}), CONFIG)
    got = by_name(decide(checkpoint, make_recipe("W4A16_MIXED")))
    schemes = {m: d.scheme.bits for m, d in got.items() if d.scheme}
    assert schemes["model.layers.0.mlp.experts.1.up_proj"] == 4
    assert schemes["model.layers.0.mlp.shared_expert.up_proj"] == 8
    assert schemes["model.layers.0.self_attn.q_proj"] == 8


REFUSALS: list[tuple[type[ShardqError], str, dict[str, Any], dict[str, Any]]] = [
    (PatternMatchesNothing, "--ignore 'q_prj'", {"ignore": ["q_prj"]}, {}),
    (PatternMatchesNothing, "--include", {"include": ["re:nothing"]}, {}),
    (PatternMatchesNothing, "--layer-config", {"layer_config": {"nope": {"bits": 8}}}, {}),
    (BadOption, "embed_tokens cannot be quantized", {"include": ["model.embed_tokens"]}, {}),
    (LayoutRefuses, "symmetric and asymmetric", {"layer_config": {"**.q_proj": {"sym": False}}}, {}),
    (NothingToQuantize, "nothing to quantize", {"ignore": ["model.layers.**"]}, {}),
    (UnknownTensor, "weird", {}, {"model.layers.0.weird": (BF16, (4, 8, 16))}),
    (UnsupportedSource, "expert stack", {}, {"model.layers.0.mlp.experts.gate_up_proj": (BF16, (4, 256, 256))}),
    (UnsupportedSource, "q_proj.weight in .* without its scales", {}, {
        "model.layers.0.self_attn.q_proj.weight": ("F8_E4M3", (256, 256))}),
    (UnsupportedSource, "scale_inv in .* is not there", {}, {
        "model.layers.0.self_attn.r_proj.weight_scale_inv": ("F32", (2, 2))}),
    (BadGroupSize, "--group-size 16 or 32", {"group_size": 256}, {}),
    (LayoutRefuses, "multiples of 32", {}, {"model.layers.0.self_attn.o_proj.weight": (BF16, (100, 256))}),
]  # fmt: skip


@pytest.mark.parametrize(("error", "match", "words", "extra"), REFUSALS, ids=[m for _, m, _, _ in REFUSALS])
def test_refusals_come_before_any_weight(
    make_checkpoint: Any,
    error: type[ShardqError],
    match: str,
    words: dict[str, Any],
    extra: dict[str, Any],
) -> None:
    with pytest.raises(error, match=match):
        decide(make_checkpoint(llama(**extra), CONFIG), make_recipe("W4A16", **words))


TIED: list[tuple[dict[str, Any], str, str | None]] = [
    # config, the embedding's module, the head that it becomes
    ({"tie_word_embeddings": True}, "model.embed_tokens", "lm_head"),
    ({"text_config": {"tie_word_embeddings": True}}, "model.language_model.embed_tokens", "lm_head"),
    ({"tie_word_embeddings": True}, "language_model.model.embed_tokens", "language_model.lm_head"),
    ({"tie_word_embeddings": True}, "transformer.wte", "lm_head"),
    ({"architectures": ["Gemma2ForCausalLM"]}, "model.embed_tokens", "lm_head"),  # its config does not say it
    ({"architectures": ["BertModel"]}, "model.embed_tokens", None),
    ({"tie_word_embeddings": False}, "model.embed_tokens", None),
    ({"tie_word_embeddings": True}, "shared", None),
    ({}, "model.embed_tokens", None),
]


@pytest.mark.parametrize(("config", "embedding", "head"), TIED)
def test_tied_head_is_made_of_the_embedding(
    make_checkpoint: Any, config: dict[str, Any], embedding: str, head: str | None
) -> None:
    tensors = llama(**{f"{embedding}.weight": (BF16, (512, 256))})
    del tensors["a.safetensors"]["lm_head.weight"]
    if embedding != "model.embed_tokens":
        del tensors["a.safetensors"]["model.embed_tokens.weight"]
    checkpoint, recipe = make_checkpoint(tensors, CONFIG | config), make_recipe("W4A16", quant_lm_head=True)
    if head is None:
        with pytest.raises(BadOption, match="has no head to quantize"):
            decide(checkpoint, recipe)
        return
    got = by_name(decide(checkpoint, recipe))
    assert (got[head].action, got[head].role, got[embedding].action) == ("quantize", "head", "copy")
    assert replace(got[head].tensor, name=got[embedding].tensor.name) == got[embedding].tensor
    assert head not in by_name(decide(checkpoint, make_recipe("W4A16")))


def test_a_head_that_a_tied_model_stores_is_taken(make_checkpoint: Any) -> None:
    checkpoint = make_checkpoint(llama(), CONFIG | {"tie_word_embeddings": True})
    got = by_name(decide(checkpoint, make_recipe("W4A16", quant_lm_head=True)))
    assert got["lm_head"].scheme
    assert got["lm_head"].tensor == checkpoint.tensors["lm_head.weight"]


def test_ignored_stacks_and_unknowns_are_copied(make_checkpoint: Any) -> None:
    extra = {
        "model.layers.0.mlp.experts.gate_up_proj": (BF16, (4, 256, 256)),
        "model.layers.0.weird": (BF16, (4, 8, 16)),
    }
    recipe = make_recipe("W4A16", ignore=["re:.*experts", "re:.*weird"])
    got = decide(make_checkpoint(llama(**extra), CONFIG), recipe)
    assert {d.action for d in got if len(d.tensor.shape or ()) == 3} == {"copy"}


def test_ragged_keep_and_shrink(make_checkpoint: Any) -> None:
    checkpoint = make_checkpoint(llama(), CONFIG)
    kept = by_name(decide(checkpoint, make_recipe("W4A16", group_size=256, ragged="keep")))
    assert kept["model.layers.0.mlp.down_proj"].rule == "ragged:keep"
    shrunk = by_name(decide(checkpoint, make_recipe("W4A16", group_size=256, ragged="shrink")))
    scheme = shrunk["model.layers.0.mlp.down_proj"].scheme
    assert scheme is not None
    assert scheme.group_size == 128


def test_index_only_checkpoints_are_decided_by_name(make_checkpoint: Any) -> None:
    from dataclasses import replace

    full = make_checkpoint(llama(), CONFIG)
    bare = {n: replace(t, dtype=None, shape=None, begin=-1, end=-1) for n, t in full.tensors.items()}
    got = decide(replace(full, tensors=bare), make_recipe("W4A16"))
    assert sum(d.action == "quantize" for d in got) == 6


MLX_NAMES = {
    "model.embed_tokens": (512, 256),
    "lm_head": (512, 256),
    "vision_tower.embeddings.patch_embed": (512, 256),
    "model.layers.0.mlp.embed_gate": (512, 256),
}


@pytest.mark.parametrize(
    ("config", "options", "wanted"),
    [
        ({"tie_word_embeddings": False}, {}, {"model.embed_tokens", "lm_head"}),
        ({"text_config": {"tie_word_embeddings": False}}, {}, {"model.embed_tokens", "lm_head"}),
        ({"tie_word_embeddings": True}, {}, {"model.embed_tokens"}),
        ({}, {}, {"model.embed_tokens"}),
        ({"tie_word_embeddings": False}, {"ignore": ["lm_head"]}, {"model.embed_tokens"}),
        ({"tie_word_embeddings": False}, {"ignore": ["model.embed_tokens"]}, {"lm_head"}),
        ({"tie_word_embeddings": False}, {"layer_config": {"lm_head": {"bits": 16}}}, {"model.embed_tokens"}),
        ({}, {"quant_lm_head": True}, {"model.embed_tokens", "lm_head"}),
    ],
)
def test_a_layout_may_want_embeddings_and_an_untied_head(
    make_checkpoint: Any, config: dict[str, Any], options: dict[str, Any], wanted: set[str]
) -> None:
    tensors = llama()
    tensors["a.safetensors"] |= {f"{m}.weight": (BF16, shape) for m, shape in MLX_NAMES.items()}
    checkpoint = make_checkpoint(tensors, CONFIG | config)
    got = by_name(decide(checkpoint, make_recipe("W4A16@mlx", **options)))
    assert {m for m in MLX_NAMES if got[m].action == "quantize"} == wanted
    assert all(got[m].action == "copy" for m in got if m.endswith(("norm", "mlp.gate")))


def test_an_exception_reaches_an_embedding_that_the_layout_wants(make_checkpoint: Any) -> None:
    recipe = make_recipe("W4A16@mlx", layer_config={"model.embed_tokens": {"bits": 8}})
    scheme = by_name(decide(make_checkpoint(llama(), CONFIG), recipe))["model.embed_tokens"].scheme
    assert scheme is not None
    assert scheme.bits == 8
