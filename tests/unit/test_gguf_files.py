"""Planned GGUF files against the gguf package's writer, byte for byte, and read back."""

import json
import struct
from pathlib import Path

import pytest
from gguf_made import (
    ALIGNMENTS,
    CASES,
    PAIRS,
    RELAXED,
    SPECS,
    Pairs,
    Specs,
    with_alignment,
    written_by_gguf,
    written_by_plan,
)
from hypothesis import given, settings

from shardq.errors import LayoutRefuses
from shardq.files.gguf import (
    ALIGNMENT_KEY,
    MAX_HEADER_BYTES,
    VALUE_TYPES,
    VALUES,
    GgufSpec,
    KeyValue,
    drop_ones,
    padding,
    plan_gguf,
    spec_bytes,
)
from shardq.files.gguf_read import parse_gguf, read_gguf
from shardq.ggml import GGML, GGML_TYPES

GOLDEN = Path(__file__).with_name("golden_gguf")
ABSENT = "gguf is not installed here; `nox -s oracles` installs it"


@pytest.mark.parametrize("case", CASES)
def test_planned_files_are_those_of_gguf(case: str) -> None:
    pairs, tensors = CASES[case]
    golden = (GOLDEN / f"{case}.gguf").read_bytes()
    assert written_by_plan(plan_gguf(pairs, tensors), tensors) == golden
    header = parse_gguf(golden, len(golden), case)
    # a float is stored in fewer bits than it was given in
    assert repr([*header.pairs.values()]) == repr([as_stored(p) for p in pairs])
    assert [GgufSpec(t.name, t.type, t.shape) for t in header.tensors] == list(tensors)


def as_stored(said: KeyValue) -> KeyValue:
    if said.type != "f32" or isinstance(said.value, tuple):
        return said
    return KeyValue(said.key, said.type, struct.unpack("<f", struct.pack("<f", said.value))[0])


@given(PAIRS, SPECS, ALIGNMENTS)
@settings(RELAXED, max_examples=150)
def test_what_is_planned_is_read_back(pairs: Pairs, tensors: Specs, alignment: int | None) -> None:
    said = with_alignment(pairs, alignment)
    plan = plan_gguf(said, tensors)
    data = written_by_plan(plan, tensors)
    header = parse_gguf(data, len(data), "made")
    assert repr(list(header.pairs.values())) == repr(list(said))
    assert {t.name: (t.begin, t.end) for t in header.tensors} == plan.offsets
    assert [GgufSpec(t.name, t.type, t.shape) for t in header.tensors] == list(tensors)
    assert (header.header_bytes_len, header.size_bytes) == (len(plan.header), plan.size_bytes)
    assert all(t.begin % (alignment or 32) == 0 for t in header.tensors)
    covered = sum(end - begin for begin, end in (*plan.offsets.values(), *padding(plan)))
    assert covered + len(plan.header) == plan.size_bytes


@pytest.mark.oracle
@given(PAIRS, SPECS, ALIGNMENTS)
@settings(RELAXED, max_examples=150)
def test_any_planned_file_is_that_of_gguf(tmp_path: Path, pairs: Pairs, tensors: Specs, alignment: int | None) -> None:
    package = pytest.importorskip("gguf", reason=ABSENT)
    path = tmp_path / "theirs.gguf"
    said = with_alignment(pairs, alignment)
    written_by_gguf(package, path, said, tensors)
    assert written_by_plan(plan_gguf(said, tensors), tensors) == path.read_bytes()
    if all(t.shape and 0 not in t.shape for t in tensors):
        reader = package.GGUFReader(path)
        ours = read_gguf(path)
        assert [(t.name, t.data_offset, t.data_offset + t.n_bytes) for t in reader.tensors] == [
            (t.name, t.begin, t.end) for t in ours.tensors
        ]


@pytest.mark.oracle
def test_tables_are_those_of_gguf() -> None:
    package = pytest.importorskip("gguf", reason=ABSENT)
    theirs = {k.name: [int(k), *v] for k, v in package.GGML_QUANT_SIZES.items()}
    assert theirs == json.loads((GOLDEN / "ggml_types.json").read_text())
    names = {"UINT": "u", "INT": "i", "FLOAT": "f"}
    for kind in package.GGUFValueType:
        if kind.name == "ARRAY":
            continue
        word = kind.name.rstrip("0123456789")
        assert VALUES[names.get(word, kind.name.lower()) + kind.name.removeprefix(word)].id == kind
    assert len(VALUE_TYPES) == len(package.GGUFValueType) - 1


def test_types_are_those_of_gguf() -> None:
    theirs = json.loads((GOLDEN / "ggml_types.json").read_text())
    ours = {t.name: [t.id, t.block_weights, t.block_bytes] for t in GGML_TYPES}
    assert ours.pop("Q2_0") == [42, 64, 18]  # of ggml 0.25.3
    assert theirs.keys() - ours.keys() == {"Q8_1", "Q8_K"}
    assert ours == {name: theirs[name] for name in ours}


def test_bytes_of_types() -> None:
    assert {
        t.name: t.block_bytes * 256 // t.block_weights for t in GGML_TYPES if t.name in ("Q4_K", "Q4_0", "F16")
    } == {
        "Q4_K": 144,
        "Q4_0": 144,
        "F16": 512,
    }
    assert GGML["Q6_K"].bits_per_weight == 6.5625
    assert spec_bytes(GgufSpec("scalar", "F32", ())) == 4
    assert spec_bytes(GgufSpec("none", "Q4_K", (256, 0))) == 0


REFUSED: dict[str, tuple[Pairs, Specs, str]] = {
    "row": ((), [GgufSpec("blk.0.w", "Q4_K", (576, 2))], "'blk.0.w': rows of 576 weights cannot be Q4_K.* of 256"),
    "row, none": ((), [GgufSpec("w", "MXFP4", (31, 0))], "rows of 31 weights"),
    "name": ((), [GgufSpec("n" * 64, "F32", (1,))], "has 64 bytes: loaders of GGUF take at most 63"),
    "name, UTF-8": ((), [GgufSpec("é" * 32, "F32", (1,))], "has 64 bytes"),
    "zero in name": ((), [GgufSpec("a\0", "F32", (1,))], "without zeros"),
    "dimensions": ((), [GgufSpec("w", "F32", (1, 1, 1, 1, 1))], "'w' has 5 dimensions"),
    "key": ([KeyValue("k" * 65536, "u8", 1)], (), "over 65535 bytes"),
    "header": ([KeyValue("k", "string", "x" * MAX_HEADER_BYTES)], (), "need a GGUF header of 134217792 bytes"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_loaders_cannot_hold_is_refused(case: str) -> None:
    pairs, tensors, message = REFUSED[case]
    with pytest.raises(LayoutRefuses, match=message) as caught:
        plan_gguf(pairs, tensors)
    assert "\n" not in str(caught.value)


W = GgufSpec("w", "F32", (1,))
MISTAKES: dict[str, tuple[Pairs, Specs, str]] = {
    "key twice": ([KeyValue("k", "u8", 1), KeyValue("k", "u8", 1)], (), "'k' is repeated"),
    "no key": ([KeyValue("", "u8", 1)], (), "empty"),
    "name twice": ((), [W, W], "'w' is repeated"),
    "negative": ((), [GgufSpec("w", "F32", (-1,))], "impossible"),
    "type of tensor": ((), [GgufSpec("w", "Q8_K", (256,))], "impossible type 'Q8_K'"),
    "type of value": ([KeyValue("k", "array", 1)], (), "unknown type 'array'"),
    "range": ([KeyValue("k", "u8", 256)], (), "'k': not u8"),
    "large float": ([KeyValue("k", "f32", 1e39)], (), "'k': not f32"),
    "surrogate": ([KeyValue("k", "string", "\ud800")], (), "'k': not string"),
    "float as integer": ([KeyValue("k", "u8", 1.0)], (), "is not u8"),
    "bool as integer": ([KeyValue("k", "u8", True)], (), "is not u8"),
    "integer as bool": ([KeyValue("k", "bool", 1)], (), "is not bool"),
    "string as float": ([KeyValue("k", "f32", "1")], (), "is not f32"),
    "mixed": ([KeyValue("k", "string", ("a", 1))], (), "is not string"),
    "alignment": ([KeyValue(ALIGNMENT_KEY, "u32", 24)], (), "power of two"),
    "alignment 0": ([KeyValue(ALIGNMENT_KEY, "u32", 0)], (), "power of two"),
    "alignment u64": ([KeyValue(ALIGNMENT_KEY, "u64", 32)], (), "as u32"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_impossible_input_is_a_programming_error(case: str) -> None:
    pairs, tensors, message = MISTAKES[case]
    with pytest.raises(ValueError, match=message):
        plan_gguf(pairs, tensors)


def test_ones_at_the_end_of_shapes() -> None:
    shapes = [(), (1,), (1, 1, 1), (3, 1), (1, 3), (2, 1, 3, 1)]
    assert [drop_ones(s) for s in shapes] == [(1,), (1,), (1,), (3,), (1, 3), (2, 1, 3)]
