"""Both pattern dialects, and the rules for single layers."""

import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardq.errors import BadOption
from shardq.patterns import LayerRule, Pattern, parse_layer_config, parse_pattern

Q = "model.layers.1.self_attn.q_proj"


@pytest.mark.parametrize(
    ("text", "hits", "misses"),
    [
        (Q, [Q], [f"{Q}.base", f"x.{Q}", "model.layers.11.self_attn.q_proj"]),
        (f"{Q}.weight", [Q], [f"{Q}.weight"]),
        ("q_proj", ["q_proj"], [Q]),
        ("model.layers.*.self_attn.q_proj", [Q], ["model.layers.1.2.self_attn.q_proj"]),
        ("model.layers.*.self_attn.*_proj", [Q], ["model.layers.1.self_attn.q_norm"]),
        ("model.layers.*.self_attn.*_proj.weight", [Q], []),
        ("model.layers.1?.*", ["model.layers.10.a"], ["model.layers.1.a", "model.layers.10.a.b"]),
        ("**.q_proj", [Q, "q_proj"], ["my.xq_proj", "q_proj.a"]),
        ("model.**", [Q, "model", "model.a"], ["modelx.a"]),
        ("**.self_attn.**", [Q, "self_attn"], ["a.self_attn2.b"]),
        ("a.**.**.b", ["a.b", "a.x.b", "a.x.y.b"], ["a.xb"]),
        ("a.[01]*", ["a.[01]", "a.[01]b"], ["a.0", "a.1"]),
        ("*", ["lm_head"], [Q]),
        ("re:.*q_proj", [Q, f"{Q}.more"], ["model.layers.1.self_attn.k_proj"]),
        ("re:model", [Q], [f"x.{Q}"]),
        (r"re:.*layers\.(0|1)\..*q_proj$", [Q], ["model.layers.11.self_attn.q_proj", f"{Q}.x"]),
    ],
)
def test_shardq_dialect(text: str, hits: list[str], misses: list[str]) -> None:
    pattern = parse_pattern(text, "shardq")
    assert pattern.text == text
    assert [m for m in hits if not pattern.matches(m)] == []
    assert [m for m in misses if pattern.matches(m)] == []


@pytest.mark.parametrize(
    ("text", "hits", "misses"),
    [
        (Q, [Q, f"x.{Q}", f"{Q}.more"], ["model.layers.1.self_attn.k_proj"]),
        ("q_proj", [Q], ["model.layers.1.self_attn.k_proj"]),
        ("attn.q", [Q], ["model.self_attn_q"]),
        ("layers.1", [Q], ["model.layers.10.mlp", "model.layers.21"]),
        ("ff.net.2", ["ff.net.2", "ff.net.2.a"], ["ff.net.20"]),
        ("*_proj", [], [Q]),  # a lone star is a plain character there
        ("layers.*q_proj", [Q], ["layerz.q_proj"]),
        ("self_attn.q_proj$", [Q], [f"{Q}.more", "self_attn_q_proj"]),
        ("^model.layers.1.", [Q], [f"x.{Q}", "model.layers.11.a"]),
        ("q_proj|k_proj", [Q, "a.k_proj.b"], ["a.v_proj"]),
        ("layers.[01]", [Q], ["model.layers.2.q_proj"]),
        (r"layers\.1\.", [], [Q]),  # the backslash is a plain character
        ("re:.*q_proj", [], [Q]),
    ],
)
def test_auto_round_dialect(text: str, hits: list[str], misses: list[str]) -> None:
    pattern = parse_pattern(text, "auto-round")
    assert [m for m in hits if not pattern.matches(m)] == []
    assert [m for m in misses if pattern.matches(m)] == []


@pytest.mark.parametrize("text", ["", "  ", "re:", "re:(", "re:a**", "re:[z-a]"])
def test_bad_pattern_is_refused(text: str) -> None:
    with pytest.raises(BadOption, match=re.escape(repr(text))):
        parse_pattern(text, "shardq")


@pytest.mark.parametrize("text", ["", "(", "a|b)", "[b"])
def test_bad_auto_round_pattern_is_refused(text: str) -> None:
    with pytest.raises(BadOption):
        parse_pattern(text, "auto-round")


_NAME = st.lists(
    st.text(
        st.characters(blacklist_characters=".*?", blacklist_categories=["Cs"]),
        min_size=1,
        max_size=4,
    ),
    min_size=1,
    max_size=5,
).filter(lambda parts: parts[-1] != "weight" and any(p.strip() for p in parts) and not parts[0].startswith("re:"))


@settings(deadline=None)
@given(_NAME, _NAME)
def test_exact_pattern_hits_only_its_name(parts: list[str], other: list[str]) -> None:
    name, second = ".".join(parts), ".".join(other)
    assert parse_pattern(name, "shardq").matches(second) == (name == second)


@settings(deadline=None)
@given(_NAME, st.data())
def test_star_stands_for_one_segment(parts: list[str], data: st.DataObject) -> None:
    place = data.draw(st.integers(0, len(parts) - 1))
    text = ".".join([*parts[:place], "*", *parts[place + 1 :]])
    pattern = parse_pattern(text, "shardq")
    assert pattern.matches(".".join(parts))
    assert not pattern.matches(".".join([*parts[:place], "a", "b", *parts[place + 1 :]]))


@settings(deadline=None)
@given(_NAME, st.data())
def test_double_star_stands_for_any_segments(parts: list[str], data: st.DataObject) -> None:
    begin = data.draw(st.integers(0, len(parts)))
    end = data.draw(st.integers(begin, len(parts)))
    text = ".".join([*parts[:begin], "**", *parts[end:]])
    assert parse_pattern(text, "shardq").matches(".".join(parts))


@settings(deadline=None)
@given(_NAME, _NAME)
def test_plain_auto_round_pattern_is_a_substring(parts: list[str], other: list[str]) -> None:
    name, second = ".".join(parts), ".".join(other)
    if not set(name) & set("^$|()[]?+") and not re.search(r"\.\d+$", name):
        assert parse_pattern(name, "auto-round").matches(second) == (name in second)
        assert parse_pattern(name, "auto-round").matches(f"a.{name}.b")


# --- layer config ------------------------------------------------------------------------------


def test_layer_config_from_mapping_keeps_order_and_values() -> None:
    rules = parse_layer_config(
        {
            "lm_head": "W8A16",
            "model.layers.*.mlp.gate": {"bits": 16},
            "re:.*o_proj": {"bits": 8, "group_size": 32, "sym": False, "scheme": "W4A16"},
        },
        "shardq",
    )
    assert rules == (
        LayerRule(Pattern("lm_head", "exact", "lm_head"), None, None, None, "W8A16"),
        LayerRule(parse_pattern("model.layers.*.mlp.gate", "shardq"), 16, None, None, None),
        LayerRule(parse_pattern("re:.*o_proj", "shardq"), 8, 32, False, "W4A16"),
    )
    assert [rule.keeps for rule in rules] == [False, True, False]


def test_layer_config_is_the_same_from_text_and_files(tmp_path: Path) -> None:
    table = {"a.b": {"bits": 4, "sym": True}, "c.*": {"scheme": "W8A16"}}
    (tmp_path / "layers.json").write_text(json.dumps(table))
    (tmp_path / "layers.toml").write_text('["a.b"]\nbits = 4\nsym = true\n["c.*"]\nscheme = "W8A16"\n')
    expected = parse_layer_config(table, "shardq")
    assert parse_layer_config(json.dumps(table, indent=1), "shardq") == expected
    assert parse_layer_config(f"  {json.dumps(table)}", "shardq") == expected
    assert parse_layer_config(tmp_path / "layers.json", "shardq") == expected
    assert parse_layer_config(str(tmp_path / "layers.toml"), "shardq") == expected


def test_layer_config_uses_the_dialect_asked_for() -> None:
    assert parse_layer_config({"mlp": {"bits": 8}}, "auto-round")[0].pattern.matches("a.mlp.b")
    assert not parse_layer_config({"mlp": {"bits": 8}}, "shardq")[0].pattern.matches("a.mlp.b")
    assert parse_layer_config({}, "shardq") == ()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ('{"a": {"bit": 4}}', "'a': unknown key 'bit'; allowed are bits, group_size, scheme, sym"),
        ('{"a": {"bits": "4"}}', "'a': bits must be int, found '4'"),
        ('{"a": {"bits": true}}', "'a': bits must be int, found True"),
        ('{"a": {"bits": null}}', "'a': bits must be int, found None"),
        ('{"a": {"bits": 1}}', "'a': bits must be 2 to 8, or 16 to keep, found 1"),
        ('{"a": {"bits": 9}}', "bits must be 2 to 8"),
        ('{"a": {"sym": 1}}', "'a': sym must be bool, found 1"),
        ('{"a": {"group_size": 1.5}}', "'a': group_size must be int"),
        ('{"a": {}}', "'a': expected a scheme name or a table"),
        ('{"a": 4}', "'a': expected a scheme name or a table"),
        ('{"a": ""}', "'a': the scheme's name is empty"),
        ('{"": {"bits": 4}}', "is empty"),
        ('{"re:(": {"bits": 4}}', "'re:\\('"),
        ('{"a": {"bits": 4}, "a": {"bits": 8}}', "'a' is given twice"),
        ('{"a": {"bits": 4, "bits": 8}}', "'bits' is given twice"),
        ('{"a": ', "no valid JSON"),
        ("{'a': {'bits': 4}}", "no valid JSON"),
        ("layers.yaml", "'layers.yaml' is neither JSON text"),
        ("", "is neither JSON text"),
        ("absent.json", "'absent.json' cannot be read"),
    ],
)
def test_layer_config_mistakes_are_named(source: str, message: str) -> None:
    with pytest.raises(BadOption, match=message) as caught:
        parse_layer_config(source, "shardq")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("list.json", b"[1]"),
        ("broken.toml", b"a = "),
        ("latin.json", b'{"\xe9": {"bits": 4}}'),
        ("deep.json", b"[" * 100_000),
    ],
)
def test_layer_config_bad_files_are_refused(tmp_path: Path, name: str, data: bytes) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(BadOption, match=name):
        parse_layer_config(tmp_path / name, "shardq")
