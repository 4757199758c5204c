import re

from hypothesis import given
from hypothesis import strategies as st

from shardq.layouts.templates import module_regexes

NAMES = st.builds(
    lambda layer, expert, leaf: f"model.layers.{layer}.{leaf}" + (f".{expert}" if expert is not None else ""),
    st.integers(0, 12),
    st.none() | st.integers(0, 3),
    st.sampled_from(["mlp.gate", "self_attn.q_proj", "mlp.experts", "a+b"]),
)


@given(st.lists(NAMES, unique=True, max_size=30), st.data())
def test_regexes_match_exactly_the_chosen_modules(everything: list[str], data: st.DataObject) -> None:
    chosen = data.draw(st.lists(st.sampled_from(everything), unique=True)) if everything else []
    regexes = module_regexes(chosen, everything)
    for name in everything:
        assert any(re.match(r, name) for r in regexes) == (name in chosen)


def test_whole_families_become_one_expression() -> None:
    gates = [f"model.layers.{i}.mlp.gate" for i in range(100)]
    assert module_regexes(gates, gates) == (r"^model\.layers\.\d+\.mlp\.gate$",)
    assert len(module_regexes(gates[:-1], gates)) == 99
