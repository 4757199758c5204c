"""The GGUF container, version 3, little-endian: what it holds, and files that are known before any tensor is.

File: header, key-value pairs, tensor infos, zeros up to the alignment, then each tensor and zeros up to the alignment,
also behind the last. Source: gguf 0.19.0 (`GGUFWriter`), ggml 0.25.3 (gguf.cpp). gguf_read.py reads, gguf_split.py
makes several files of one.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, TypeGuard

from shardq.errors import LayoutRefuses
from shardq.files.safetensors import FilePlan
from shardq.ggml import GGML, tensor_bytes

MAGIC: Final = b"GGUF"
VERSION: Final = 3
ALIGNMENT_KEY: Final = "general.alignment"
DEFAULT_ALIGNMENT: Final = 32
MAX_NAME_BYTES: Final = 63  # of a tensor: ggml's GGML_MAX_NAME has room for a zero behind it
MAX_KEY_BYTES: Final = 0xFFFF  # the specification's
MAX_DIMENSIONS: Final = 4
# Ours: the largest real headers are vocabularies of some 20 MB, and values take several times their bytes in memory.
MAX_HEADER_BYTES: Final = 1 << 27

Scalar = bool | int | float | str


@dataclass(frozen=True, slots=True)
class ValueType:
    """One type of value."""

    name: str
    id: int  # in the file
    code: str  # of `struct`; "" for what has no fixed size


VALUE_TYPES: Final[tuple[ValueType, ...]] = (
    ValueType("u8", 0, "B"),
    ValueType("i8", 1, "b"),
    ValueType("u16", 2, "H"),
    ValueType("i16", 3, "h"),
    ValueType("u32", 4, "I"),
    ValueType("i32", 5, "i"),
    ValueType("f32", 6, "f"),
    ValueType("bool", 7, "?"),
    ValueType("string", 8, ""),
    ValueType("u64", 10, "Q"),
    ValueType("i64", 11, "q"),
    ValueType("f64", 12, "d"),
)
ARRAY_ID: Final = 9  # element type, count, elements back to back
STRING: Final = "string"
VALUES: Final[dict[str, ValueType]] = {t.name: t for t in VALUE_TYPES}
VALUES_BY_ID: Final[dict[int, ValueType]] = {t.id: t for t in VALUE_TYPES}


@dataclass(frozen=True, slots=True)
class KeyValue:
    """One entry of the metadata. A tuple is an array; `type` is then that of its elements.

    Strings are UTF-8; bytes that are none stand as lone surrogates ("surrogateescape"), as some vocabularies have them.
    """

    key: str
    type: str
    value: Scalar | tuple[Scalar, ...]


@dataclass(frozen=True, slots=True)
class GgufSpec:
    """A tensor to be written; `shape` in GGUF's order: the row length first, reversed against safetensors'."""

    name: str
    type: str
    shape: tuple[int, ...]


def plan_gguf(pairs: Sequence[KeyValue], tensors: Sequence[GgufSpec]) -> FilePlan:
    """Header, offsets and size of the file that gguf 0.19.0's `GGUFWriter` writes for the same input, to the byte.

    Pairs and tensors keep their order, as in llama.cpp's converter. The alignment is the pair `general.alignment`'s
    (u32), else 32. Bytes that belong to no tensor (`padding`) are zeros. An empty array is written; GGUFWriter leaves
    out the whole pair, and an empty string, without a word. Floats are rounded to f32 to the nearest; NaN and infinity
    are written as they are. ggml's own writer has no dimensions of 1 at the end: see `drop_ones`.
    Raises LayoutRefuses for what loaders cannot hold (rows that are not whole blocks, names over 63 bytes, more than 4
    dimensions, a header over 128 MiB), ValueError for what is a mistake of the caller (a repeated key or name, a value
    that its type cannot hold).
    """
    alignment = _alignment(pairs)
    head = bytearray(MAGIC + struct.pack("<IQQ", VERSION, len(tensors), len(pairs)))
    keys: set[str] = set()
    for pair in pairs:
        if pair.key in keys or not pair.key:
            raise ValueError(f"key {pair.key!a} is repeated or empty")
        keys.add(pair.key)
        head += _pair(pair)
    spans: dict[str, tuple[int, int]] = {}
    position = 0
    for spec in tensors:
        if spec.name in spans:
            raise ValueError(f"tensor name {spec.name!a} is repeated")
        end = position + spec_bytes(spec)
        spans[spec.name] = (position, end)
        head += _info(spec, position)
        position = align(end, alignment)
    begin = align(len(head), alignment)
    if begin > MAX_HEADER_BYTES:
        raise LayoutRefuses(
            f"{len(pairs)} keys and {len(tensors)} tensors need a GGUF header of {begin} bytes, at most "
            f"{MAX_HEADER_BYTES} are read back; write fewer tensors to one file"
        )
    offsets = {name: (begin + a, begin + b) for name, (a, b) in spans.items()}
    return FilePlan(bytes(head) + bytes(begin - len(head)), offsets, begin + position)


def padding(plan: FilePlan) -> tuple[tuple[int, int], ...]:
    """The spans behind the header that belong to no tensor; their bytes are zero."""
    found = []
    position = len(plan.header)
    for begin, end in (*plan.offsets.values(), (plan.size_bytes, plan.size_bytes)):
        if position < begin:
            found.append((position, begin))
        position = end
    return tuple(found)


def spec_bytes(spec: GgufSpec) -> int:
    """Bytes of a tensor's data. Raises LayoutRefuses, which names the tensor, for rows that are not whole blocks."""
    kind = GGML.get(spec.type)
    if kind is None or any(d < 0 for d in spec.shape):
        raise ValueError(f"tensor {spec.name!a}: impossible type {spec.type!a} or shape {list(spec.shape)}")
    try:
        return tensor_bytes(kind, spec.shape)
    except LayoutRefuses as error:
        raise LayoutRefuses(f"tensor {spec.name!a}: {error}") from error


def drop_ones(shape: Sequence[int]) -> tuple[int, ...]:
    """`shape` as ggml's writer has it (llama_model_quantize, gguf-split): no 1 at the end, at least one dimension.

    The Python writer, and so the converter, keeps them.
    """
    kept = list(shape) or [1]
    while len(kept) > 1 and kept[-1] == 1:
        kept.pop()
    return tuple(kept)


def align(position: int, alignment: int) -> int:
    """The first multiple of `alignment` that is not before `position`."""
    return -(-position // alignment) * alignment


def _alignment(pairs: Sequence[KeyValue]) -> int:
    for pair in pairs:
        if pair.key == ALIGNMENT_KEY:
            if pair.type != "u32" or not is_alignment(pair.value):
                raise ValueError(f"{ALIGNMENT_KEY} {pair.value!a} ({pair.type}): expected a power of two as u32")
            return int(pair.value)
    return DEFAULT_ALIGNMENT


def is_alignment(value: object) -> TypeGuard[int]:
    """True for a power of two."""
    return type(value) is int and value > 0 and not value & (value - 1)


def _string(text: str) -> bytes:
    data = text.encode("utf-8", "surrogateescape")
    return len(data).to_bytes(8, "little") + data


def _pair(pair: KeyValue) -> bytes:
    if len(pair.key.encode()) > MAX_KEY_BYTES:
        raise LayoutRefuses(f"key {pair.key[:40]!a}... has over {MAX_KEY_BYTES} bytes, more than GGUF allows")
    kind = VALUES.get(pair.type)
    if kind is None:
        raise ValueError(f"key {pair.key!a}: unknown type {pair.type!a}; known are {', '.join(VALUES)}")
    head = _string(pair.key)
    if isinstance(pair.value, tuple):
        head += struct.pack("<IIQ", ARRAY_ID, kind.id, len(pair.value))
    else:
        head += struct.pack("<I", kind.id)
    values = pair.value if isinstance(pair.value, tuple) else (pair.value,)
    if not all(_fits(sort, kind) for sort in set(map(type, values))):  # of a few types, not of each token
        raise ValueError(f"key {pair.key!a}: {str(pair.value)[:80]!a} is not {kind.name}")
    try:
        if not kind.code:
            return head + b"".join(map(_string, map(str, values)))
        return head + struct.pack(f"<{len(values)}{kind.code}", *values)
    except (struct.error, OverflowError, UnicodeEncodeError) as error:
        raise ValueError(f"key {pair.key!a}: not {kind.name}: {error}") from error


def _fits(sort: type, kind: ValueType) -> bool:
    """Of the right sort; `struct` checks ranges. True is no integer here, though Python has it so."""
    if kind.name == STRING:
        return issubclass(sort, str)
    if kind.name == "bool":
        return issubclass(sort, bool)
    if issubclass(sort, bool):
        return False
    return issubclass(sort, int) or (issubclass(sort, float) and kind.code in "fd")


def _info(spec: GgufSpec, position: int) -> bytes:
    name = spec.name.encode()
    if len(name) > MAX_NAME_BYTES or b"\0" in name:
        raise LayoutRefuses(
            f"tensor name {spec.name[:200]!a} has {len(name)} bytes: loaders of GGUF take at most {MAX_NAME_BYTES}, "
            "without zeros"
        )
    count = len(spec.shape)
    if count > MAX_DIMENSIONS:
        raise LayoutRefuses(
            f"tensor {spec.name!a} has {count} dimensions {list(spec.shape)}, GGUF holds at most {MAX_DIMENSIONS}"
        )
    numbers = struct.pack(f"<I{count}QIQ", count, *spec.shape, GGML[spec.type].id, position)
    return struct.pack("<Q", len(name)) + name + numbers
