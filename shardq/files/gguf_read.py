"""A parser of GGUF headers that trusts nothing.

The rules are those of ggml 0.25.3's own reader (gguf.cpp), which takes only tensors in the order of the header, each at
the first multiple of the alignment behind the one before. Stricter here: names and keys that are no UTF-8, zeros in
names, types that ggml.py does not have, booleans other than 0 and 1, a header over 128 MiB (`MAX_HEADER_BYTES`), and
bytes behind the last tensor are refused. As there, the zeros behind the last tensor may be missing.
"""

import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from shardq.errors import LayoutRefuses, UnknownDtype
from shardq.files.cursor import Cursor, Fetch, fetching
from shardq.files.gguf import (
    ALIGNMENT_KEY,
    ARRAY_ID,
    DEFAULT_ALIGNMENT,
    MAGIC,
    MAX_DIMENSIONS,
    MAX_HEADER_BYTES,
    MAX_KEY_BYTES,
    MAX_NAME_BYTES,
    STRING,
    VALUES_BY_ID,
    VERSION,
    KeyValue,
    ValueType,
    align,
    is_alignment,
)
from shardq.ggml import GGML_BY_ID, GgmlType, tensor_bytes

VERSIONS: Final = (2, VERSION)  # they differ in nothing but the possible order of bytes
_MIN_PAIR_BYTES: Final = 8 + 4 + 1
_MIN_INFO_BYTES: Final = 8 + 4 + 4 + 8
_I64_MAX: Final = (1 << 63) - 1


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One tensor as the header describes it; `begin` and `end` count from the start of the file, without padding."""

    name: str
    type: str
    shape: tuple[int, ...]  # in GGUF's order: the row length first
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """A checked header."""

    version: int
    pairs: Mapping[str, KeyValue]  # by key, in file order
    tensors: tuple[GgufTensor, ...]  # in file order
    alignment: int
    header_bytes_len: int  # padding included: where the tensor data begins
    size_bytes: int  # of the file, the padding behind the last tensor included


@dataclass(frozen=True, slots=True)
class _Info:
    """One tensor as it is written, before its place is checked."""

    name: str
    kind: GgmlType
    shape: tuple[int, ...]
    offset: int


def parse_gguf(raw: bytes, file_size_bytes: int, shard: str) -> GgufHeader:
    """Check and read the header in `raw`, the first bytes of a file of `file_size_bytes`; it may be longer.

    Raises CorruptShard (names file, and tensor or key), UnknownDtype.
    """
    return scan_gguf(lambda offset, count: raw[offset : offset + count], file_size_bytes, shard)


def read_gguf(path: str | os.PathLike[str], shard: str | None = None) -> GgufHeader:
    """Read the header of a local file, and nothing behind it but what a buffer of 64 KiB reaches.

    `shard` is the name for messages, by default the file name. Raises CorruptShard, UnknownDtype, SourceUnreadable.
    """
    name = shard or os.path.basename(path)
    with fetching(path, f"GGUF file {name}") as (fetch, size_bytes):
        return scan_gguf(fetch, size_bytes, name)


def scan_gguf(fetch: Fetch, file_size_bytes: int, shard: str) -> GgufHeader:
    """Check and read the header of a file of which `fetch` reads ranges, as `parse_gguf` does."""
    cursor = Cursor(fetch, file_size_bytes, f"GGUF file {shard}", MAX_HEADER_BYTES)
    if (magic := cursor.take(len(MAGIC), "magic")) != MAGIC:
        raise cursor.wrong(f"begins with {magic!a}, expected {MAGIC!a}")
    version = cursor.whole(4, "version")
    if version not in VERSIONS:
        raise cursor.wrong(f"GGUF version {version}, expected {' or '.join(map(str, VERSIONS))}, little-endian")
    tensor_count, pair_count = cursor.whole(8, "number of tensors"), cursor.whole(8, "number of keys")
    if _MIN_INFO_BYTES * tensor_count + _MIN_PAIR_BYTES * pair_count > cursor.left_bytes:
        raise cursor.wrong(f"{tensor_count} tensors and {pair_count} keys do not fit {cursor.left_bytes} bytes")
    pairs = {pair.key: pair for pair in _pairs(cursor, pair_count)}
    alignment = _alignment(cursor, pairs)
    infos = list(_infos(cursor, tensor_count))
    begin = align(cursor.position, alignment)
    tensors, end = _place(cursor, infos, begin, alignment, file_size_bytes)
    if file_size_bytes > end:
        raise cursor.wrong(f"{file_size_bytes - end} trailing bytes behind byte {end}, the end of its last tensor")
    return GgufHeader(version, pairs, tensors, alignment, begin, end)


def _pairs(cursor: Cursor, count: int) -> Iterator[KeyValue]:
    seen: set[str] = set()
    for _ in range(count):
        key = cursor.text(cursor.whole(8, "length of a key"), MAX_KEY_BYTES, "key")
        where = f"key {_brief(key)}"
        if not key or key in seen:
            raise cursor.wrong(f"{where} is empty" if not key else f"{where} is there twice")
        seen.add(key)
        yield _pair(cursor, key, where)


def _pair(cursor: Cursor, key: str, where: str) -> KeyValue:
    kind_id = cursor.whole(4, f"type of {where}")
    if kind_id != ARRAY_ID:
        kind = VALUES_BY_ID.get(kind_id)
        if kind is None:
            raise cursor.wrong(f"{where} has the unknown type {kind_id}")
        return KeyValue(key, kind.name, _values(cursor, kind, 1, f"value of {_brief(key)}")[0])
    of, count = cursor.whole(4, f"type in {where}"), cursor.whole(8, f"length of {where}")
    kind = VALUES_BY_ID.get(of)
    if kind is None:  # an array of arrays too: no loader takes one
        raise cursor.wrong(f"{where} is an array of {count} values of type {of}, which is unknown or nested")
    return KeyValue(key, kind.name, _values(cursor, kind, count, f"values of {_brief(key)}"))


def _values(cursor: Cursor, kind: ValueType, count: int, what: str) -> tuple[bool | int | float | str, ...]:
    """`count` values back to back; nothing is allocated for them before their bytes are known to be there."""
    if kind.name == STRING:
        if 8 * count > cursor.left_bytes:
            raise cursor.wrong(f"{what}: an array of {count} strings does not fit {cursor.left_bytes} bytes")
        return tuple(cursor.texts(count, what))
    data = cursor.take(count * struct.calcsize(kind.code), what)
    if kind.code == "?" and data.strip(b"\0\1"):
        raise cursor.wrong(f"{what}: a boolean other than 0 and 1")
    return struct.unpack(f"<{count}{kind.code}", data)


def _alignment(cursor: Cursor, pairs: Mapping[str, KeyValue]) -> int:
    pair = pairs.get(ALIGNMENT_KEY)
    if pair is None:
        return DEFAULT_ALIGNMENT
    if pair.type != "u32" or not is_alignment(pair.value):
        raise cursor.wrong(
            f"{ALIGNMENT_KEY}: alignment {_brief(pair.value)} ({pair.type}), expected a power of two as u32"
        )
    return pair.value


def _infos(cursor: Cursor, count: int) -> Iterator[_Info]:
    seen: set[str] = set()
    for _ in range(count):
        name = cursor.text(cursor.whole(8, "length of a tensor's name"), MAX_NAME_BYTES, "name of a tensor")
        where = f"tensor {_brief(name)}"
        if name in seen or "\0" in name:
            raise cursor.wrong(f"{where} is there twice" if name in seen else f"{where} has a zero in its name")
        seen.add(name)
        dimensions = cursor.whole(4, f"dimensions of {where}")
        if dimensions > MAX_DIMENSIONS:
            raise cursor.wrong(f"{where} has {dimensions} dimensions, at most {MAX_DIMENSIONS} are possible")
        shape = tuple(cursor.whole(8, f"shape of {where}") for _ in range(dimensions))
        kind = GGML_BY_ID.get(type_id := cursor.whole(4, f"type of {where}"))
        if kind is None:
            known = ", ".join(f"{t.id} {t.name}" for t in GGML_BY_ID.values())
            raise UnknownDtype(f"{cursor.label}, {where}: unknown type {type_id}; known are {known}")
        yield _Info(name, kind, shape, cursor.whole(8, f"offset of {where}"))


def _place(
    cursor: Cursor, infos: list[_Info], begin: int, alignment: int, file_size_bytes: int
) -> tuple[tuple[GgufTensor, ...], int]:
    """Tensors with their checked places, and where the padding behind the last one ends."""
    placed = []
    position = 0
    for info in infos:
        where = f"tensor {_brief(info.name)}"
        try:
            end = info.offset + tensor_bytes(info.kind, info.shape)
        except LayoutRefuses as error:
            raise cursor.wrong(f"{where}: {error}") from error
        if begin + end > file_size_bytes:
            raise cursor.wrong(f"{where}: data up to byte {begin + end} is missing, there are {file_size_bytes}")
        if any(d > _I64_MAX for d in info.shape):  # beside a 0, which hides it above
            raise cursor.wrong(f"{where}: shape {_brief(list(info.shape))} overflows 63 bits")
        if info.offset != position:
            kind = "overlaps the tensor before it" if info.offset < position else "leaves a hole before it"
            raise cursor.wrong(f"{where} {kind}: its data begins at {info.offset}, expected {position}")
        placed.append(GgufTensor(info.name, info.kind.name, info.shape, begin + info.offset, begin + end))
        position = align(end, alignment)
    return tuple(placed), begin + position


def _brief(value: object) -> str:
    """`value` for a message: ASCII, one line, cut, since a hostile header can hold megabytes."""
    text = ascii(value)
    return text if len(text) <= 160 else text[:160] + "..."
