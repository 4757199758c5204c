"""A reader of GGUF headers that no file can mislead: every lie is refused by name."""

import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
from gguf_made import ALIGNMENTS, CASES, PAIRS, RELAXED, SPECS, info, pack, text, with_alignment, written_by_plan
from hypothesis import given, settings
from hypothesis import strategies as st
from importance_files_made import pair

from shardq.errors import CorruptShard, SourceUnreadable, UnknownDtype
from shardq.files.gguf import ALIGNMENT_KEY, GgufSpec, KeyValue, plan_gguf
from shardq.files.gguf_read import GgufHeader, parse_gguf, read_gguf

GOLDEN = Path(__file__).with_name("golden_gguf")
Change = Callable[[bytearray, int], None]

A = info("a")  # F32 [8]: 32 bytes
LIES: dict[str, tuple[bytes, str]] = {
    "empty file": (b"", "magic needs 4 bytes, 0 are left"),
    "other magic": (b"GGML" + bytes(60), "begins with b'GGML'"),
    "version 1": (pack(version=1), "GGUF version 1, expected 2 or 3"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "version 50331648"),
    "half a header": (pack()[:20], "number of keys needs 8 bytes"),
    "tensor count": (b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 0) + bytes(99), "1152921504606846976 tensors"),
    "key count": (b"GGUF" + struct.pack("<IQQ", 3, 0, 8) + bytes(99), "8 keys do not fit 99 bytes"),
    "length of key": (pack([struct.pack("<Q", 1 << 63) + bytes(40)]), "key has 9223372036854775808 bytes"),
    "long key": (pack([pair("k" * 65536, 0, b"\0")]), "key has 65536 bytes, at most 65535"),
    "no key": (pack([pair("", 0, b"\0")]), "key '' is empty"),
    "key, UTF-8": (pack([struct.pack("<Q", 1) + b"\xff" + struct.pack("<IB", 0, 0)]), "key is no UTF-8"),
    "key twice": (pack([pair("k", 0, b"\0"), pair("k", 0, b"\0")]), "key 'k' is there twice"),
    "value type": (pack([pair("k", 13, bytes(9))]), "key 'k' has the unknown type 13"),
    "bool": (pack([pair("k", 7, b"\2")]), "value of 'k': a boolean other"),
    "bools": (pack([pair("k", 9, struct.pack("<IQ", 7, 3) + b"\0\1\3")]), "values of 'k': a boolean other"),
    "string": (pack([pair("k", 8, struct.pack("<Q", 1 << 40))]), "value of 'k' needs 1099511627776 bytes"),
    "numbers": (pack([pair("k", 9, struct.pack("<IQ", 10, 1 << 61))]), "values of 'k' needs 18446744073709551616"),
    "strings": (pack([pair("k", 9, struct.pack("<IQ", 8, 1 << 62))]), "an array of 4611686018427387904 strings"),
    "string in array": (
        pack([pair("k", 9, struct.pack("<IQQ", 8, 1, 1 << 62) + bytes(40))]),
        "values of 'k' needs 4611686018427387904 bytes",
    ),
    "nested": (pack([pair("k", 9, struct.pack("<IQIQ", 9, 1, 9, 1))]), "array of 1 values of type 9, which is unknown"),
    "alignment 24": (pack([pair(ALIGNMENT_KEY, 4, struct.pack("<I", 24))]), "alignment 24 "),
    "alignment 0": (pack([pair(ALIGNMENT_KEY, 4, struct.pack("<I", 0))]), "alignment 0 "),
    "alignment u64": (pack([pair(ALIGNMENT_KEY, 10, struct.pack("<Q", 32))]), r"alignment 32 \(u64\)"),
    "alignment text": (pack([pair(ALIGNMENT_KEY, 8, text("x"))]), "alignment 'x'"),
    "alignment array": (pack([pair(ALIGNMENT_KEY, 9, struct.pack("<IQI", 4, 1, 32))]), r"alignment \(32,\)"),
    "long name": (pack(infos=[info("n" * 64)], data=32), "name of a tensor has 64 bytes, at most 63"),
    "name, UTF-8": (pack(infos=[A.replace(b"a", b"\xff")], data=32), "name of a tensor is no UTF-8"),
    "zero in name": (pack(infos=[info("a\0")], data=32), r"tensor 'a\\x00' has a zero in its name"),
    "name twice": (pack(infos=[A, info("a", offset=32)], data=64), "tensor 'a' is there twice"),
    "dimensions": (pack(infos=[info("a", shape=(1,) * 5)], data=32), "tensor 'a' has 5 dimensions"),
    "no whole blocks": (
        pack(infos=[info("a", 12, (255,))], data=999),
        "tensor 'a': rows of 255 weights cannot be Q4_K",
    ),
    "overflow": (pack(infos=[info("a", shape=(1 << 62, 4))], data=32), "tensor 'a': data up to byte .* is missing"),
    "hidden overflow": (pack(infos=[info("a", shape=(1 << 63, 0))]), "overflows 63 bits"),
    "far": (pack(infos=[info("a", offset=1 << 63)], data=32), "tensor 'a': data up to byte .* is missing"),
    "cut": (pack(infos=[A], data=31), "tensor 'a': data up to byte 96 is missing, there are 95"),
    "overlap": (pack(infos=[A, info("b")], data=64), "tensor 'b' overlaps the tensor before it: .* at 0, expected 32"),
    "not aligned": (pack(infos=[info("a", shape=(3,)), info("b", offset=12)], data=64), "'b' overlaps .* at 12, exp"),
    "hole": (pack(infos=[A, info("b", offset=64)], data=96), "tensor 'b' leaves a hole before it"),
    "hole at the start": (pack(infos=[info("a", offset=32)], data=64), "tensor 'a' leaves a hole"),
    "order": (pack(infos=[info("b", offset=32), A], data=64), "tensor 'b' leaves a hole"),
    "other alignment": (
        pack([pair(ALIGNMENT_KEY, 4, struct.pack("<I", 64))], [A, info("b", offset=32)], 96, alignment=64),
        "tensor 'b' overlaps",
    ),
    "trailing": (pack(infos=[A], data=33), "1 trailing bytes behind byte 96"),
    "trailing, no tensors": (pack(data=1), "1 trailing bytes behind byte 32"),
}


@pytest.mark.parametrize("lie", LIES)
def test_lying_file_is_refused(lie: str, tmp_path: Path) -> None:
    data, message = LIES[lie]
    path = tmp_path / "model-q4.gguf"
    path.write_bytes(data)
    for read in (lambda: parse_gguf(data, len(data), "model-q4.gguf"), lambda: read_gguf(path)):
        with pytest.raises(CorruptShard, match=message) as caught:
            read()
        assert "GGUF file model-q4.gguf, byte " in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", [4, 9, 15, 31, 36, 43, 1 << 31])
def test_unknown_type_has_its_own_error(kind: int) -> None:
    data = pack(infos=[info("weird", kind)], data=32)
    with pytest.raises(UnknownDtype, match=f"GGUF file m, tensor 'weird': unknown type {kind}; known are 0 F32, 1 F16"):
        parse_gguf(data, len(data), "m")


def test_hostile_text_does_not_flood_the_message() -> None:
    data = pack([pair("x\n" * 30_000, 13, b"")])
    with pytest.raises(CorruptShard, match="unknown type 13") as caught:
        parse_gguf(data, len(data), "m")
    assert len(str(caught.value)) < 400
    assert "\n" not in str(caught.value)


def test_version_2_scalars_and_padding_that_is_not_there() -> None:
    data = pack([pair("k", 0, b"\7")], [info("scalar", shape=()), info("b", 30, (3,), 32)], 32 + 6, version=2)
    header = parse_gguf(data, len(data), "m")
    begin = header.header_bytes_len
    assert (header.version, header.pairs, header.alignment) == (2, {"k": KeyValue("k", "u8", 7)}, 32)
    assert [(t.name, t.type, t.shape, t.begin - begin, t.end - begin) for t in header.tensors] == [
        ("scalar", "F32", (), 0, 4),
        ("b", "BF16", (3,), 32, 38),
    ]
    assert header.size_bytes == begin + 64 == len(data) + 26


def test_lengths_allocate_nothing_before_they_are_checked(tmp_path: Path) -> None:
    """Also where the file is as long as they say, of holes."""
    path = tmp_path / "holes.gguf"
    lies = {
        "string": pair("k", 8, struct.pack("<Q", 1 << 32)),
        "numbers": pair("k", 9, struct.pack("<IQ", 10, 1 << 30)),
        "strings": pair("k", 9, struct.pack("<IQ", 8, 1 << 30)),
    }
    for lie in lies.values():
        for head in (pack([lie]), b"GGUF" + struct.pack("<IQQ", 3, 1 << 28, 1 << 20) + bytes(64)):
            path.write_bytes(head)
            with path.open("r+b") as file:
                file.truncate(1 << 36)
            tracemalloc.start()
            with pytest.raises(CorruptShard, match=r"(needs|fit) .*134217"):
                read_gguf(path)
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            assert peak < 1 << 20


def test_header_of_many_windows(tmp_path: Path) -> None:
    words = tuple("☃" * (i % 50) for i in range(20_000))
    pairs = [
        KeyValue("words", "string", words),
        KeyValue("numbers", "u64", tuple(range(20_000))),
        KeyValue("long", "string", "x" * 300_000),
        *(KeyValue(f"key {i}", "string", word) for i, word in enumerate(words[:3000])),
    ]
    tensors = [GgufSpec(f"blk.{i}.w", "I8", (1, 1 + i % 3)) for i in range(3000)]
    plan = plan_gguf(pairs, tensors)
    path = tmp_path / "m.gguf"
    path.write_bytes(plan.header + bytes(plan.size_bytes - len(plan.header)))
    header = read_gguf(path)
    assert list(header.pairs.values()) == pairs
    assert {t.name: (t.begin, t.end) for t in header.tensors} == plan.offsets
    assert parse_gguf(plan.header, plan.size_bytes, "m.gguf") == header


def test_missing_files_and_folders(tmp_path: Path) -> None:
    for path in (tmp_path / "nothing", tmp_path):
        with pytest.raises(SourceUnreadable):
            read_gguf(path)


@pytest.mark.parametrize("case", CASES)
def test_every_truncation_is_refused(case: str, tmp_path: Path) -> None:
    whole = (GOLDEN / f"{case}.gguf").read_bytes()
    header = parse_gguf(whole, len(whole), case)
    last = max((t.end for t in header.tensors), default=header.header_bytes_len - 31)
    for size in range(last):
        with pytest.raises(CorruptShard):
            parse_gguf(whole[:size], size, case)
    for size in range(max(last, header.header_bytes_len), len(whole)):
        assert parse_gguf(whole[:size], size, case) == header
    path = tmp_path / "m.gguf"
    path.write_bytes(whole)
    assert read_gguf(path) == header
    for known in range(0, header.header_bytes_len - 31, 97):  # a prefix that is too short for its header
        with pytest.raises(CorruptShard, match="is cut off"):
            parse_gguf(whole[:known], len(whole), case)


def same(header: GgufHeader) -> str:
    """NaN equals itself in writing."""
    return repr((list(header.pairs.values()), header.tensors, header.alignment, header.size_bytes))


@st.composite
def damaged_files(draw: st.DrawFn) -> bytes:
    """A valid file with bytes changed, cut out, doubled or put in, mostly in its header."""
    pairs, tensors = draw(PAIRS), draw(SPECS)
    plan = plan_gguf(with_alignment(pairs, draw(ALIGNMENTS)), tensors)
    data = bytearray(written_by_plan(plan, tensors))
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, max(0, min(len(data), len(plan.header)) - 1)))
        draw(st.sampled_from(CHANGES))(data, at)
        if draw(st.booleans()):
            break
    del data[len(data) - draw(st.sampled_from([0, 0, 0, 0, 1, 40])) :]
    return bytes(data)


def flip(data: bytearray, at: int) -> None:
    data[at : at + 1] = bytes([data[at] ^ 1 << at % 8]) if at < len(data) else b"\1"


def huge(data: bytearray, at: int) -> None:
    data[at : at + 8] = struct.pack("<Q", (1 << 64) - 1 - at)


def small(data: bytearray, at: int) -> None:
    data[at : at + 4] = struct.pack("<I", at % 14)


def cut(data: bytearray, at: int) -> None:
    del data[at : at + 1 + at % 9]


def double(data: bytearray, at: int) -> None:
    data[at:at] = data[at : at + 1 + at % 33]


CHANGES: list[Change] = [flip, flip, huge, small, cut, double]


@given(damaged_files())
@settings(RELAXED, max_examples=400)
def test_damage_raises_our_errors_only_and_what_passes_is_sound(raw: bytes) -> None:
    try:
        header = parse_gguf(raw, len(raw), "fuzzed")
    except (CorruptShard, UnknownDtype):
        return
    tensors = [GgufSpec(t.name, t.type, t.shape) for t in header.tensors]
    plan = plan_gguf(list(header.pairs.values()), tensors)
    assert same(parse_gguf(plan.header, plan.size_bytes, "again")) == same(header)
    assert plan.size_bytes >= len(raw) >= max((t.end for t in header.tensors), default=0)


@given(st.binary(max_size=300), st.integers(0, 3), st.integers(0, 3))
@settings(RELAXED, max_examples=200)
def test_random_bytes_raise_our_errors_only(noise: bytes, tensor_count: int, pair_count: int) -> None:
    for raw in (noise, b"GGUF" + struct.pack("<IQQ", 3, tensor_count, pair_count) + noise):
        try:
            parse_gguf(raw, len(raw), "noise")
        except (CorruptShard, UnknownDtype):
            continue
