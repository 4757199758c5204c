"""llama.cpp's importance matrices, in the old binary format and in GGUF. imatrix_names.py knows whose they are.

Sources: llama.cpp, tools/imatrix/imatrix.cpp (writer), common/imatrix-loader.cpp and tools/quantize/quantize.cpp (how
values are divided), docs of GGUF version 3.
"""

import os
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import BinaryIO, Final

from shardq.errors import BadImportance
from shardq.files.atomic import reading
from shardq.importance_files import Entry, Provenance, short

GGUF_MAGIC: Final = b"GGUF"
_VERSIONS: Final = (2, 3)
_F32: Final = 0
_STRING: Final = 8
_ARRAY: Final = 9
_SCALARS: Final = {  # value type -> struct code
    0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<B", 10: "<Q", 11: "<q", 12: "<d",
}  # fmt: skip
_MAX_STRING_BYTES: Final = 1 << 20
_MAX_NAME_BYTES: Final = 256
_MAX_SLICES: Final = 1 << 16
_CHUNK_TOKENS: Final = 512  # llama-imatrix's default context, which the old format does not record


class _Cursor:
    """Reads a file in order and takes nothing that is not there."""

    def __init__(self, file: BinaryIO, size_bytes: int, label: str) -> None:
        self._file, self._size_bytes, self._label = file, size_bytes, label
        self.position = 0

    @property
    def left_bytes(self) -> int:
        """Bytes up to the end of the file."""
        return self._size_bytes - self.position

    def take(self, count: int, what: str) -> bytes:
        """The next `count` bytes."""
        self._check(count, what)
        self.position += count
        data = self._file.read(count)
        if len(data) < count:
            raise self.wrong(f"{what} is cut off")
        return data

    def skip(self, count: int, what: str) -> None:
        """Go on behind `count` bytes."""
        self._check(count, what)
        self.go(self.position + count)

    def go(self, position: int) -> None:
        """Go on at a place that is inside the file."""
        self.position = position
        self._file.seek(position)

    def number(self, code: str, what: str) -> int:
        """One number of `struct`'s format; a float is cut to a whole one."""
        value = struct.unpack(code, self.take(struct.calcsize(code), what))[0]
        return int(value) if value == value and abs(value) != float("inf") else 0

    def text(self, count: int, limit: int, what: str) -> str:
        """A string of `count` bytes; what is no UTF-8 is replaced."""
        if not 0 <= count <= limit:
            raise self.wrong(f"{what} has {count} bytes, at most {limit} are expected")
        return self.take(count, what).decode("utf-8", "replace")

    def wrong(self, reason: str) -> BadImportance:
        """The error for what cannot be read."""
        return BadImportance(
            f"importance {self._label}, byte {self.position}: {reason}; not an imatrix, or damaged: get the file again"
        )

    def _check(self, count: int, what: str) -> None:
        if count > self.left_bytes:
            raise self.wrong(f"{what} needs {count} bytes, {self.left_bytes} are left")


def read_imatrix(path: str, label: str) -> tuple[Provenance, dict[str, Entry]]:
    """The entries of an imatrix of either format, by llama.cpp's names; `label` is the file's name for messages.

    Values are not read, but for the counts. Raises BadImportance, SourceUnreadable.
    """
    with reading(path), open(path, "rb") as file:
        size_bytes = os.fstat(file.fileno()).st_size
        is_gguf = file.read(len(GGUF_MAGIC)) == GGUF_MAGIC
        file.seek(0)
        cursor = _Cursor(file, size_bytes, label)
        return _read_gguf(cursor) if is_gguf else _read_legacy(cursor)


def _read_legacy(cursor: _Cursor) -> tuple[Provenance, dict[str, Entry]]:
    """i32 number of entries; of each: i32 length and name, i32 calls, i32 number of values, F32 values times calls;
    then, in newer ones, i32 chunks, i32 length and name of the text."""
    count = cursor.number("<i", "number of entries")
    if count < 1 or 12 * count > cursor.left_bytes:
        raise cursor.wrong(f"{count} entries")
    entries: dict[str, Entry] = {}
    for _ in range(count):
        name = cursor.text(cursor.number("<i", "length of a name"), _MAX_NAME_BYTES, "name of an entry")
        calls = cursor.number("<i", f"calls of {short(name)}")
        values = cursor.number("<i", f"number of values of {short(name)}")
        if values < 1 or name in entries:
            raise cursor.wrong(f"{short(name)} has {values} values" if values < 1 else f"{short(name)} is there twice")
        entries[name] = Entry(cursor.position, values, (float(calls) if calls > 0 else 1.0,))
        cursor.skip(4 * values, f"values of {short(name)}")
    if not cursor.left_bytes:
        return Provenance("text"), entries
    chunks = cursor.number("<i", "number of chunks")
    text = ""
    if cursor.left_bytes:
        length = cursor.number("<i", "length of the text's name")
        text = cursor.text(length, _MAX_STRING_BYTES, "name of the text")
    return Provenance("text", max(0, chunks) * _CHUNK_TOKENS or None, text=_base(text)), entries


@dataclass(frozen=True, slots=True)
class _Tensor:
    """One tensor of a GGUF file."""

    elements: int
    type: int
    offset: int  # from the start of the data


def _read_gguf(cursor: _Cursor) -> tuple[Provenance, dict[str, Entry]]:
    """GGUF version 2 or 3, little-endian: `X.in_sum2` F32 [columns, slices] and `X.counts` F32 [1, slices]."""
    cursor.skip(len(GGUF_MAGIC), "magic")
    version = cursor.number("<I", "version")
    if version not in _VERSIONS:
        raise cursor.wrong(f"GGUF version {version}, expected {' or '.join(map(str, _VERSIONS))}, little-endian")
    tensor_count, pair_count = cursor.number("<Q", "number of tensors"), cursor.number("<Q", "number of keys")
    if 32 * tensor_count + 13 * pair_count > cursor.left_bytes:
        raise cursor.wrong(f"{tensor_count} tensors and {pair_count} keys")
    pairs: dict[str, int | str | tuple[str, ...] | None] = {}
    for _ in range(pair_count):
        key = _string(cursor, "key")
        if key in pairs:
            raise cursor.wrong(f"key {short(key)} is there twice")
        pairs[key] = _value(cursor, cursor.number("<I", f"type of {short(key)}"), short(key))
    tensors = dict(_tensor_infos(cursor, tensor_count))
    alignment = pairs.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise cursor.wrong(f"alignment {short(alignment)}")
    data = -(-cursor.position // alignment) * alignment
    entries = {}
    for name, tensor in tensors.items():
        stem = name.removesuffix(".in_sum2")
        if stem != name:
            entries[stem] = _gguf_entry(cursor, stem, tensor, tensors.get(f"{stem}.counts"), data)
    if not entries:
        raise cursor.wrong(f"none of its {tensor_count} tensors is of an imatrix (is it a model?)")
    return _gguf_provenance(pairs), entries


def _tensor_infos(cursor: _Cursor, count: int) -> Iterator[tuple[str, _Tensor]]:
    seen: set[str] = set()
    for _ in range(count):
        name = cursor.text(cursor.number("<Q", "length of a name"), _MAX_NAME_BYTES, "name of a tensor")
        dimensions = cursor.number("<I", f"dimensions of {short(name)}")
        if not 1 <= dimensions <= 4 or name in seen:
            raise cursor.wrong(f"{short(name)} has {dimensions} dimensions, or is there twice")
        seen.add(name)
        elements = 1
        for _ in range(dimensions):
            elements *= cursor.number("<Q", f"shape of {short(name)}")
        kind = cursor.number("<I", f"type of {short(name)}")
        yield name, _Tensor(elements, kind, cursor.number("<Q", f"offset of {short(name)}"))


def _gguf_entry(cursor: _Cursor, name: str, sums: _Tensor, counts: _Tensor | None, data: int) -> Entry:
    if counts is None or sums.type != _F32 or counts.type != _F32:
        raise cursor.wrong(f"{short(name)}: expected F32 in_sum2 and counts")
    slices = counts.elements
    if not 1 <= slices <= _MAX_SLICES or sums.elements < 1 or sums.elements % slices:
        raise cursor.wrong(f"{short(name)}: {slices} counts for {sums.elements} values")
    for tensor in (sums, counts):
        end = data + tensor.offset + 4 * tensor.elements
        if end > cursor.position + cursor.left_bytes:
            raise cursor.wrong(f"{short(name)}: data up to byte {end} is missing")
    here = cursor.position
    cursor.go(data + counts.offset)
    found = struct.unpack(f"<{slices}f", cursor.take(4 * slices, f"counts of {short(name)}"))
    cursor.go(here)
    if not all(0 <= c < float("inf") for c in found):
        raise cursor.wrong(f"{short(name)}: counts are negative or not finite")
    return Entry(data + sums.offset, sums.elements, tuple(float(int(c + 0.5)) for c in found))


def _string(cursor: _Cursor, what: str) -> str:
    return cursor.text(cursor.number("<Q", f"length of a {what}"), _MAX_STRING_BYTES, what)


def _value(cursor: _Cursor, kind: int, key: str) -> int | str | tuple[str, ...] | None:
    """A value; of arrays only those of strings are kept."""
    if kind in _SCALARS:
        return cursor.number(_SCALARS[kind], f"value of {key}")
    if kind == _STRING:
        return _string(cursor, f"value of {key}")
    if kind != _ARRAY:
        raise cursor.wrong(f"{key} has the unknown type {kind}")
    of, count = cursor.number("<I", f"type in {key}"), cursor.number("<Q", f"length of {key}")
    if of in _SCALARS:
        cursor.skip(count * struct.calcsize(_SCALARS[of]), f"values of {key}")
        return None
    if of != _STRING or 8 * count > cursor.left_bytes:
        raise cursor.wrong(f"{key} is an array of {count} values of type {of}")
    return tuple(_string(cursor, f"value of {key}") for _ in range(count))


def _gguf_provenance(pairs: Mapping[str, int | str | tuple[str, ...] | None]) -> Provenance:
    chunks, size = pairs.get("imatrix.chunk_count"), pairs.get("imatrix.chunk_size")
    texts = pairs.get("imatrix.datasets")
    tokens = chunks * size if isinstance(chunks, int) and isinstance(size, int) else None
    names = [_base(t) for t in texts] if isinstance(texts, tuple) else []
    return Provenance("text", tokens or None, text=", ".join(names))


def _base(path: str) -> str:
    """The file's name alone: where it lay is nobody's business. In one line."""
    name = re.split(r"[/\\]", path)[-1][:200]
    return "".join(c if c.isprintable() else "?" for c in name)
