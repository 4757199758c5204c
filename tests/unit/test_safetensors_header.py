"""The header parser: every lie is refused by name, and whatever passes the reference reader takes " "too."""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize, safe_open

from shardq.errors import CorruptShard, ShardqError, SourceUnreadable, UnknownDtype
from shardq.files.safetensors import (
    MAX_JSON_BYTES,
    TensorSpec,
    header_span,
    parse_header,
    plan_file,
    read_header,
)

Entries = Mapping[str, Any]
REFERENCE: Callable[[bytes], object] = deserialize


def entry(dtype: str, shape: list[Any], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def pack(header: Entries | bytes | str, data: bytes = b"") -> bytes:
    text = json.dumps(header) if isinstance(header, Mapping) else header
    body = text.encode() if isinstance(text, str) else text
    return len(body).to_bytes(8, "little") + body + data


def accepted_by_reference(raw: bytes) -> bool:
    try:
        REFERENCE(raw)
    except SafetensorError:
        return False
    return True


GOOD = {
    "__metadata__": {"format": "pt", "naïve": "☃"},
    "b": entry("F16", [2, 3], 4, 16),
    "a": entry("F4", [8], 0, 4),
    "empty": entry("I64", [0, 7], 16, 16),
    "scalar": entry("F32", [], 16, 20),
}


def test_good_header_is_read_in_file_order() -> None:
    raw = pack(GOOD, bytes(20))
    header = parse_header(raw, len(raw), "s")
    begin = len(raw) - 20
    assert header.header_bytes_len == begin
    assert [(t.name, t.begin - begin, t.end - begin) for t in header.tensors] == [
        ("a", 0, 4),
        ("b", 4, 16),
        ("empty", 16, 16),
        ("scalar", 16, 20),
    ]
    assert header.tensors[1].shape == (2, 3)
    assert header.tensors[3].shape == ()
    assert header.metadata == {"format": "pt", "naïve": "☃"}
    assert header.sha256 == hashlib.sha256(raw[8:begin]).hexdigest()
    assert accepted_by_reference(raw)


def test_header_may_be_unpadded_and_without_tensors() -> None:
    assert parse_header(pack("{}"), 10, "s").tensors == ()
    assert parse_header(pack("{}\n \t"), 13, "s").tensors == ()


U8 = entry("U8", [4], 0, 4)
LIES: dict[str, tuple[bytes, str]] = {
    "empty file": (b"", "truncated: 0 bytes"),
    "half a prefix": (b"\x02\0\0", "truncated: 3 bytes"),
    "huge header": ((MAX_JSON_BYTES + 1).to_bytes(8, "little") + b"{}", "claims a header of 100000001"),
    "header beyond the file": ((100).to_bytes(8, "little") + b"{}", "truncated: its header needs 108"),
    "no JSON": (pack("{]"), "not valid JSON"),
    "text behind JSON": (pack('{"a":' + json.dumps(U8) + "}x", bytes(4)), "not valid JSON"),
    "empty header": (pack(""), "not valid JSON"),
    "no UTF-8": (pack(b'{"\xff":' + json.dumps(U8).encode() + b"}", bytes(4)), "not valid JSON"),
    "byte order mark": (pack("\ufeff{}"), "not valid JSON"),
    "NaN": (pack('{"a":NaN}'), "NaN is not JSON"),
    "deep nesting": (pack("[" * 100_000), "not valid JSON"),
    "list": (pack("[]"), "not a JSON object"),
    "duplicate tensor": (pack('{"a":U,"a":U}'.replace("U", json.dumps(U8)), bytes(4)), "'a' occurs twice"),
    "duplicate field": (pack('{"a":{"dtype":"U8","dtype":"I8","shape":[1],"data_offsets":[0,1]}}', b"1"), "twice"),
    "duplicate metadata": (pack('{"__metadata__":{"k":"1","k":"2"}}'), "'k' occurs twice"),
    "lone surrogate": (pack('{"\\ud800":U}'.replace("U", json.dumps(U8)), bytes(4)), "not valid Unicode"),
    "metadata no object": (pack({"__metadata__": "x"}), "not an object of strings"),
    "metadata null": (pack({"__metadata__": None}), "not an object of strings"),
    "metadata number": (pack({"__metadata__": {"k": 1}}), "'k' is not a string"),
    "entry no object": (pack({"a": [1]}), "'a': expected the fields"),
    "missing field": (pack({"a": {"dtype": "U8", "shape": [1]}}), "expected the fields"),
    "extra field": (pack({"a": {**U8, "x": 1}}, bytes(4)), "expected the fields"),
    "dtype no string": (pack({"a": {**U8, "dtype": 3}}, bytes(4)), "dtype is not a string"),
    "shape no list": (pack({"a": {**U8, "shape": 4}}, bytes(4)), "shape is not a list"),
    "bool in shape": (pack({"a": entry("U8", [True], 0, 1)}, bytes(1)), "shape is not a list"),
    "float in shape": (pack({"a": entry("U8", [4.0], 0, 4)}, bytes(4)), "shape is not a list"),
    "negative shape": (pack({"a": entry("U8", [-4, -1], 0, 4)}, bytes(4)), "not an unsigned"),
    "minus zero": (pack('{"a":{"dtype":"U8","shape":[-0],"data_offsets":[0,0]}}'), "not an unsigned"),
    "giant number": (
        pack('{"a":{"dtype":"U8","shape":[%s],"data_offsets":[0,1]}}' % ("9" * 5000), b"1"),
        "not an unsigned",
    ),
    "overflow": (pack({"a": entry("U8", [2**63, 4, 0], 0, 0)}), "overflows 64 bits"),
    "bits overflow": (pack({"a": entry("F64", [2**60], 0, 0)}), "overflows 64 bits"),
    "three offsets": (pack({"a": {**U8, "data_offsets": [0, 4, 4]}}, bytes(4)), "not a begin and an end"),
    "end before begin": (pack({"a": entry("U8", [4], 4, 0)}, bytes(4)), "not a begin and an end"),
    "shape and bytes differ": (pack({"a": entry("U8", [5], 0, 4)}, bytes(4)), "needs 5 bytes, the header gives 4"),
    "half a byte": (pack({"a": entry("F4", [3], 0, 2)}, bytes(2)), "does not end on a whole byte"),
    "overlap": (pack({"a": U8, "b": entry("U8", [4], 2, 6)}, bytes(6)), "'b' overlaps"),
    "hole": (pack({"a": U8, "b": entry("U8", [2], 6, 8)}, bytes(8)), "'b' leaves a hole"),
    "hole at the start": (pack({"b": entry("U8", [2], 6, 8)}, bytes(8)), "'b' leaves a hole"),
    "truncated": (pack({"a": U8, "b": entry("U8", [4], 4, 8)}, bytes(7)), "truncated: .*first tensor cut: 'b'"),
    "trailing": (pack({"a": U8}, bytes(5)), "1 trailing bytes"),
}


@pytest.mark.parametrize("lie", LIES)
def test_lying_header_is_refused(lie: str) -> None:
    raw, message = LIES[lie]
    with pytest.raises(CorruptShard, match=message) as caught:
        parse_header(raw, len(raw), "model-7.safetensors")
    assert "model-7.safetensors" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unknown_dtype_has_its_own_error() -> None:
    raw = pack({"weird": entry("F7", [1], 0, 1)}, b"1")
    with pytest.raises(UnknownDtype, match="shard s, tensor 'weird': unknown dtype 'F7'"):
        parse_header(raw, len(raw), "s")


def test_hostile_name_does_not_flood_the_message() -> None:
    raw = pack({"x\n" * 100_000: entry("U8", [5], 0, 4)}, bytes(4))
    with pytest.raises(CorruptShard) as caught:
        parse_header(raw, len(raw), "s")
    assert len(str(caught.value)) < 400
    assert "\n" not in str(caught.value)


def test_read_header_of_a_file(tmp_path: Path) -> None:
    raw = pack(GOOD, bytes(20))
    path = tmp_path / "m.safetensors"
    path.write_bytes(raw)
    assert read_header(path) == parse_header(raw, len(raw), "m.safetensors")
    assert header_span(raw[:8], len(raw), "m") == len(raw) - 20
    for size in range(len(raw)):
        path.write_bytes(raw[:size])
        with pytest.raises(CorruptShard, match=r"m\.safetensors is truncated"):
            read_header(path)
    with pytest.raises(SourceUnreadable, match="nothing"):
        read_header(tmp_path / "nothing")
    with pytest.raises(SourceUnreadable):
        read_header(tmp_path)


@st.composite
def damaged_files(draw: st.DrawFn) -> bytes:
    """A valid file with bytes flipped, cut out, doubled or inserted, the prefix mostly kept " "honest."""
    specs = [
        TensorSpec(
            name,
            draw(st.sampled_from(["U8", "F16", "BF16", "F4", "I64"])),
            tuple(draw(st.lists(st.sampled_from([0, 2, 4]), max_size=3))),
        )
        for name in draw(st.lists(st.text(max_size=6), max_size=4, unique=True))
    ]
    specs = [s if s.shape or s.dtype != "F4" else TensorSpec(s.name, "U8", ()) for s in specs]
    plan = plan_file(specs)
    body = bytearray(plan.header[8:])
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, len(body)))
        kind = draw(st.sampled_from(["digit", "flip", "cut", "insert", "double"]))
        if kind == "digit":
            places = [i for i, b in enumerate(body) if chr(b).isdigit()]
            if places:
                body[draw(st.sampled_from(places))] = draw(st.sampled_from(b"0123456789-.e"))
        elif kind == "flip" and at < len(body):
            body[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "cut":
            del body[at : at + draw(st.integers(1, 4))]
        elif kind == "insert":
            token = draw(
                st.sampled_from(
                    [
                        b'"',
                        b"{",
                        b"}",
                        b",",
                        b"0",
                        b"-",
                        b"true",
                        b"null",
                        b"1e3",
                        b" ",
                        b"\\u0000",
                        b"\xff",
                    ]
                )
            )
            body[at:at] = token
        else:
            body[at:at] = body[at : at + draw(st.integers(1, 30))]
    count = len(body) + draw(st.sampled_from([0, 0, 0, 0, 0, 0, -1, 1, 2**40]))
    data_bytes = max(0, plan.size_bytes - len(plan.header) + draw(st.sampled_from([0, 0, 0, 0, 0, -1, 1])))
    return count.to_bytes(8, "little", signed=True) + bytes(body) + bytes(data_bytes)


@given(damaged_files())
@settings(max_examples=300, deadline=None)
def test_damage_raises_our_errors_only_and_what_passes_is_sound(raw: bytes) -> None:
    try:
        header = parse_header(raw, len(raw), "fuzzed")
    except ShardqError:
        return
    assert accepted_by_reference(raw)
    assert sum(t.end - t.begin for t in header.tensors) + header.header_bytes_len == len(raw)


@given(st.binary(max_size=200))
@settings(max_examples=200, deadline=None)
def test_random_bytes_raise_our_errors_only(data: bytes) -> None:
    for raw in (data, pack(data), pack(b'{"a":' + data + b"}")):
        try:
            parse_header(raw, len(raw), "fuzzed")
        except ShardqError:
            continue
        assert accepted_by_reference(raw)


@given(st.integers(0, 2**32))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_accepted_file_opens_with_equal_names_and_shapes(tmp_path: Path, seed: int) -> None:
    plan = plan_file([TensorSpec(f"t{i}", "I16", (seed % (i + 2), i)) for i in range(seed % 5)])
    path = tmp_path / "m.safetensors"
    path.write_bytes(plan.header + bytes(plan.size_bytes - len(plan.header)))
    header = read_header(path)
    with safe_open(str(path), "np") as opened:
        assert sorted(opened.keys()) == sorted(t.name for t in header.tensors)
        assert all(tuple(opened.get_slice(t.name).get_shape()) == t.shape for t in header.tensors)
