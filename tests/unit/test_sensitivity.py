"""What the damage of a module is multiplied by, from its name and its place."""

import pytest

from shardq.sensitivity import weigh_modules


def names(layers: int, leaf: str, prefix: str = "model.layers") -> list[str]:
    return [f"{prefix}.{i}.{leaf}" for i in range(layers)]


@pytest.mark.parametrize(
    ("leaf", "factor"),
    [
        ("self_attn.v_proj", 2.0),
        ("attention.self.value", 2.0),
        ("self_attn.q_proj", 0.5),
        ("self_attn.k_proj", 0.5),
        ("self_attn.o_proj", 1.0),
        ("self_attn.kv_b_proj", 1.0),
        ("linear_attn.in_proj_qkvz", 1.0),
    ],
)
def test_attention_has_one_factor_in_all_layers(leaf: str, factor: float) -> None:
    assert set(weigh_modules(names(16, leaf)).values()) == {factor}


@pytest.mark.parametrize(
    "leaf", ["mlp.down_proj", "mlp.experts.7.gate_proj", "block_sparse_moe.experts.0.w2", "ffn.up"]
)
def test_feed_forward_counts_more_in_the_first_and_the_last_eighth(leaf: str) -> None:
    factors = weigh_modules(names(30, leaf))
    assert [i for i, m in enumerate(names(30, leaf)) if factors[m] == 8.0] == [0, 1, 2, 27, 28, 29]
    assert set(factors.values()) == {1.0, 8.0}


def test_layers_are_counted_for_each_part_of_a_model_alone() -> None:
    """And a model of few layers has none that are first or last."""
    text, vision = names(16, "mlp.up_proj"), names(4, "mlp.up_proj", "visual.blocks")
    factors = weigh_modules([*vision, *text])
    assert [m for m in factors if factors[m] != 1.0] == [text[i] for i in (0, 1, 14, 15)]
    assert weigh_modules(["lm_head", "mlp.up_proj"]) == {"lm_head": 1.0, "mlp.up_proj": 1.0}
