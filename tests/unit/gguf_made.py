"""GGUF files for the tests: what they hold, written at planned offsets and by the gguf package."""

import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from shardq.files.gguf import ALIGNMENT_KEY, VALUES, GgufSpec, KeyValue
from shardq.files.safetensors import FilePlan
from shardq.ggml import GGML, GGML_TYPES

Pairs = Sequence[KeyValue]
Specs = Sequence[GgufSpec]

ALL_VALUES = (
    KeyValue("general.architecture", "string", "llama"),
    KeyValue("general.name", "string", "naïve ☃ 😀"),
    *(KeyValue(f"least.{t}", t, -(1 << int(t[1:]) - 1)) for t in ("i8", "i16", "i32", "i64")),
    *(KeyValue(f"most.{t}", t, (1 << int(t[1:])) - 1) for t in ("u8", "u16", "u32", "u64")),
    KeyValue("f32", "f32", 1e-05),
    KeyValue("f64", "f64", 1e-05),
    KeyValue("infinite", "f32", float("-inf")),
    KeyValue("true", "bool", True),
    KeyValue("false", "bool", False),
    KeyValue("tokenizer.ggml.tokens", "string", ("<unk>", "\udcff\udc80", "", "▁a")),
    KeyValue("tokenizer.ggml.scores", "f32", (0.0, -1.5, 3.0)),
    KeyValue("tokenizer.ggml.token_type", "i32", (1, 2, 6, -7)),
    KeyValue("flags", "bool", (True, False, True)),
    KeyValue("bytes", "u8", (0, 255)),
    KeyValue("large", "u64", (1 << 63,)),
    KeyValue("general.quantization_version", "u32", 2),
)
SOME_TENSORS = (
    GgufSpec("token_embd.weight", "Q6_K", (256, 3)),
    GgufSpec("blk.0.attn_norm.weight", "F32", (5,)),
    GgufSpec("blk.0.ffn_down_exps.weight", "Q4_0", (32, 2, 3)),
    GgufSpec("blk.0.ffn_up_shexp.weight", "BF16", (3, 1)),
    GgufSpec("blk.0.four", "F16", (1, 2, 1, 3)),
    GgufSpec("none", "F16", (4, 0)),
    GgufSpec("position", "I32", (1,)),
    GgufSpec("output.weight", "MXFP4", (64, 1)),
)
CASES: Mapping[str, tuple[Pairs, Specs]] = {
    "values": ((*ALL_VALUES, KeyValue("zero", "string", "a\0b")), SOME_TENSORS),
    "aligned": ((ALL_VALUES[0], KeyValue(ALIGNMENT_KEY, "u32", 128), *ALL_VALUES[-2:]), SOME_TENSORS),
    "vocabulary": (ALL_VALUES, ()),
}
SPLIT_BYTES = 150  # of the converter's golden parts: the second is full to the byte
# gguf-split takes megabytes alone: at 1M the first part is full to the byte, and the third would be without padding.
MEGABYTES = tuple(GgufSpec(f"blk.{i}.w", "F16", (1000, n)) for i, n in enumerate((250, 250, 501, 400, 1, 99, 1)))


def data_of(spec: GgufSpec) -> bytes:
    """Some bytes that differ between tensors."""
    kind = GGML[spec.type]
    count = kind.block_bytes * int(np.prod(spec.shape, dtype=int)) // kind.block_weights
    return ((np.arange(count) * 7 + len(spec.name)) % 251).astype(np.uint8).tobytes()


def written_by_plan(plan: FilePlan, specs: Specs) -> bytes:
    """The file, its tensors written last first; what nobody writes is zero."""
    out = bytearray(plan.size_bytes)
    for spec in reversed(specs):
        begin, end = plan.offsets[spec.name]
        data = data_of(spec)
        assert end - begin == len(data)
        out[begin:end] = data
    out[: len(plan.header)] = plan.header
    return bytes(out)


def written_by_gguf(package: Any, path: Path, pairs: Pairs, specs: Specs, **options: Any) -> None:
    """`GGUFWriter` of the gguf package; `options` are its own."""
    writer = package.GGUFWriter(path, "", **options)
    for pair in pairs:
        kind = package.GGUFValueType(VALUES[pair.type].id)
        if pair.key == ALIGNMENT_KEY:
            writer.add_custom_alignment(pair.value)
        elif isinstance(pair.value, tuple):
            values = tuple(map(raw, pair.value))
            writer.add_key_value(pair.key, values, package.GGUFValueType.ARRAY, sub_type=kind)
        else:
            writer.add_key_value(pair.key, raw(pair.value), kind)
    for spec in specs:
        kind = GGML[spec.type]
        columns, *rows = spec.shape
        shape = (*rows[::-1], columns // kind.block_weights * kind.block_bytes)
        array = np.frombuffer(data_of(spec), np.uint8).reshape(shape)
        writer.add_tensor(spec.name, array, raw_dtype=package.GGMLQuantizationType(kind.id))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def raw(value: Any) -> Any:
    """The package takes bytes for strings that are no UTF-8."""
    return value.encode("utf-8", "surrogateescape") if isinstance(value, str) else value


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def info(name: str, kind: int = 0, shape: Sequence[int] = (8,), offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def pack(
    pairs: Sequence[bytes] = (),
    infos: Sequence[bytes] = (),
    data: int | bytes = 0,
    version: int = 3,
    alignment: int = 32,
) -> bytes:
    """A file put together by hand, with lies where the parts have them; `data` is a number of zeros, or bytes."""
    head = b"GGUF" + struct.pack("<IQQ", version, len(infos), len(pairs)) + b"".join([*pairs, *infos])
    return head + bytes(-len(head) % alignment) + (bytes(data) if isinstance(data, int) else data)


# --- any of them ---------------------------------------------------------------------------------------------------

STRINGS = st.one_of(st.text(max_size=6), st.binary(max_size=6).map(lambda b: b.decode("utf-8", "surrogateescape")))


def values_of(name: str) -> st.SearchStrategy[Any]:
    if name == "string":
        return STRINGS
    if name == "bool":
        return st.booleans()
    if name[0] == "f":
        return st.floats(width=32 if name == "f32" else 64)
    bits = int(name[1:])
    return st.integers(0, (1 << bits) - 1) if name[0] == "u" else st.integers(-(1 << bits - 1), (1 << bits - 1) - 1)


@st.composite
def key_values(draw: st.DrawFn) -> KeyValue:
    kind = draw(st.sampled_from(sorted(VALUES)))
    key = draw(st.text(min_size=1, max_size=9))
    one = values_of(kind)
    return KeyValue(key, kind, draw(st.one_of(one, st.lists(one, min_size=1, max_size=4).map(tuple))))


@st.composite
def specs(draw: st.DrawFn) -> GgufSpec:
    kind = draw(st.sampled_from([t for t in GGML_TYPES if t.name != "Q2_0"]))  # which gguf 0.19.0 does not know
    columns = kind.block_weights * draw(st.integers(0, 3))
    return GgufSpec(draw(st.text(max_size=9)), kind.name, (columns, *draw(st.lists(st.integers(0, 3), max_size=3))))


PAIRS = st.lists(key_values(), max_size=5, unique_by=lambda p: p.key)
SPECS = st.lists(specs(), max_size=5, unique_by=lambda s: s.name).filter(lambda s: not any("\0" in t.name for t in s))
ALIGNMENTS = st.sampled_from([None, 1, 8, 32, 64, 4096])
RELAXED = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


def with_alignment(pairs: Pairs, alignment: int | None) -> Pairs:
    return pairs if alignment is None else [*pairs, KeyValue(ALIGNMENT_KEY, "u32", alignment)]
