"""Where scales can be moved, by names and shapes: of tensors that no one reads."""

from collections.abc import Mapping
from typing import Any, Final

import pytest

from shardq.checkpoint import TensorRef
from shardq.fold_sites import PairSite, find_sites

CONFIG: Final[Mapping[str, Any]] = {"model_type": "llama", "num_key_value_heads": 2, "num_attention_heads": 4}
LAYER: Final[Mapping[str, tuple[int, ...]]] = {
    "input_layernorm": (64,), "post_attention_layernorm": (64,), "self_attn.q_proj": (64, 64),
    "self_attn.k_proj": (32, 64), "self_attn.v_proj": (32, 64), "self_attn.o_proj": (64, 64),
    "mlp.gate_proj": (96, 64), "mlp.up_proj": (96, 64), "mlp.down_proj": (64, 96),
}  # fmt: skip


def refs(shapes: Mapping[str, tuple[int, ...]], prefix: str = "model.layers.0.") -> dict[str, TensorRef]:
    names = {
        f"{prefix}{n}" if n.endswith(("bias", "inv_freq")) else f"{prefix}{n}.weight": s for n, s in shapes.items()
    }
    return {n: TensorRef(n, "model.safetensors", "BF16", s, 0, 0) for n, s in names.items()}


def test_a_layer_of_a_known_family() -> None:
    sites = find_sites(refs({**LAYER, "self_attn.v_proj.bias": (32,), "self_attn.rotary_emb.inv_freq": (8,)}), CONFIG)
    assert sites.left == ()
    assert [s.norm for s in sites.norms] == [
        f"model.layers.0.{n}_layernorm.weight" for n in ("input", "post_attention")
    ]
    assert [n.rpartition("_proj")[0][-1] for n in (*sites.norms[0].of, *sites.norms[0].also)] == ["v", "q", "k"]
    mlp, attention = sorted(sites.pairs, key=lambda p: p.rows)
    assert isinstance(attention, PairSite)
    assert attention.bias == "model.layers.0.self_attn.v_proj.bias"
    # Heads of 16: the first two of four take their values from the first of two.
    assert list(attention.owners) == [*range(16), *range(16), *range(16, 32), *range(16, 32)]
    assert mlp.owners == range(96)
    assert mlp.bias is None


def test_latent_heads() -> None:
    config = {"model_type": "deepseek_v3", "qk_nope_head_dim": 3, "v_head_dim": 2}
    shapes = {"self_attn.kv_b_proj": (10, 8), "self_attn.o_proj": (64, 4)}
    (pair,) = find_sites(refs(shapes), config).pairs
    assert list(pair.owners) == [3, 4, 8, 9]
    sites = find_sites(refs({**shapes, "self_attn.o_proj": (64, 6)}), config)
    assert sites.pairs == ()
    assert "shapes" in sites.left[0]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"self_attn.indexer.wk": (64, 64)}, "self_attn.indexer.wk"),
        ({"mlp.experts.gate_up_proj.bias": (64, 64)}, "mlp.experts.gate_up_proj"),  # a stack that is kept whole
        ({"input_layernorm.bias": (64,)}, "shapes"),
        ({"self_attn.k_proj": (32, 48)}, "shapes"),
        ({"self_attn.o_proj": (64, 80)}, "shapes"),
        ({"self_attn.v_proj.bias": (31,)}, "shapes"),
    ],
)
def test_layers_that_stay_as_they_are(change: Mapping[str, tuple[int, ...]], reason: str) -> None:
    tensors = refs({**LAYER, **change}) | refs(LAYER, "model.layers.1.")
    sites = find_sites(tensors, CONFIG)
    assert {s.norm.split(".")[2] for s in sites.norms} == {"1"}
    assert {p.rows.split(".")[2] for p in sites.pairs} == {"1"}
    assert len(sites.left) == 1
    assert reason in sites.left[0]


def test_other_models_and_parts_have_none() -> None:
    for config in ({"model_type": "cohere"}, {"model_type": "gemma3n"}, {}, None):
        assert find_sites(refs(LAYER), config).norms == ()
    vision = refs(LAYER, "model.visual.layers.0.")
    assert find_sites(vision, {"model_type": "qwen2_vl", "text_config": CONFIG}).norms == ()
    unknown = {n: TensorRef(n, "a", None, None, -1, -1) for n in refs(LAYER)}
    assert find_sites(unknown, CONFIG).norms == ()


def test_experts_and_what_stands_beside_them() -> None:
    mlp = {n: s for n, s in LAYER.items() if not n.startswith("mlp")}
    for e in range(3):
        mlp |= {f"mlp.experts.{e}.{n}_proj": (48, 64) for n in ("gate", "up")} | {
            f"mlp.experts.{e}.down_proj": (64, 48)
        }
    mlp |= {"mlp.gate": (3, 64), "mlp.shared_expert_gate": (1, 64)}
    mlp |= {f"mlp.shared_expert.{n}_proj": (96, 64) for n in ("gate", "up")} | {"mlp.shared_expert.down_proj": (64, 96)}
    sites = find_sites(refs(mlp), {**CONFIG, "model_type": "qwen2_moe"})
    assert sites.left == ()
    fed = sites.norms[1]
    assert len(fed.of) == 4
    assert len(fed.also) == 4 + 2
    assert len(sites.pairs) == 1 + 3 + 1
    assert {p.columns: p.rows for p in sites.pairs}["model.layers.0.mlp.experts.2.down_proj.weight"].endswith(
        "experts.2.up_proj.weight"
    )
