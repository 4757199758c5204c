import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardq.config_json import set_in, set_key
from shardq.errors import SourceUnreadable

BLOCK = {"quant_method": "gptq", "bits": 4, "dynamic": {"-:^a$": {}}}
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.text(max_size=8),
    lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=4), x, max_size=3),
    max_leaves=8,
)


@given(
    st.dictionaries(st.text(max_size=6), VALUES, max_size=5),
    st.sampled_from([None, 0, 2, 4, "\t"]),
    st.booleans(),
    st.sampled_from(["", "\n", "  \n\n"]),
)
def test_only_our_key_changes(source: dict[str, Any], indent: Any, ascii_only: bool, tail: str) -> None:
    text = json.dumps(source, indent=indent, ensure_ascii=ascii_only) + tail
    out = set_key(text, "quantization_config", BLOCK)
    assert json.loads(out) == {**source, "quantization_config": BLOCK}
    if "quantization_config" not in source and source:
        inner = text.rstrip()[:-1].rstrip()  # everything up to the end of the last value stays as it is
        assert out.startswith(inner)


def test_spelling_of_numbers_and_order_survive() -> None:
    text = '{\n    "rope_theta": 1e6,\n    "eps": 1E-05,\n    "name": "caf\\u00e9"\n}'
    out = set_key(text, "quantization_config", {"bits": 4})
    assert out == text[:-2] + ',\n    "quantization_config": {\n        "bits": 4\n    }\n}'


def test_replaces_where_it_stands() -> None:
    out = set_key('{"a": 1, "quantization_config": null, "b": 2}', "quantization_config", {"bits": 4})
    assert list(json.loads(out)) == ["a", "quantization_config", "b"]
    assert json.loads(out)["quantization_config"] == {"bits": 4}


def test_the_same_key_in_a_string_or_deeper_is_not_ours() -> None:
    text = '{"a": "\\"quantization_config\\": 1}", "text_config": {"quantization_config": 7}}'
    out = json.loads(set_key(text, "quantization_config", {"bits": 4}))
    assert out["text_config"]["quantization_config"] == 7
    assert out["quantization_config"] == {"bits": 4}


def test_a_key_is_set_in_a_part() -> None:
    text = '{\n  "text_config": {\n    "eps": 1E-05,\n    "tied": true\n  },\n  "tied": true\n}'
    assert set_in(text, "text_config", "tied", False) == text.replace('"tied": true\n  }', '"tied": false\n  }')
    added = set_in(text, "text_config", "n", 1)
    assert added == text.replace('"tied": true\n  }', '"tied": true,\n    "n": 1\n  }')
    assert set_in(text, "vision_config", "n", 1) == text
    assert set_in(text, "tied", "n", 1) == text


@pytest.mark.parametrize("text", ["", "[]", "{", '{"a": }', "null"])
def test_what_is_no_object_is_refused(text: str) -> None:
    with pytest.raises(SourceUnreadable, match="not a JSON object"):
        set_key(text, "quantization_config", BLOCK)
