"""llama.cpp's importance matrices, in the old binary format and in GGUF. imatrix_names.py knows whose they are.

Sources: llama.cpp, tools/imatrix/imatrix.cpp (writer), common/imatrix-loader.cpp and tools/quantize/quantize.cpp (how
values are divided), docs of GGUF version 3.
"""

import re
import struct
from collections.abc import Mapping
from math import prod
from typing import Final

from shardq.errors import BadImportance, CorruptShard, UnknownDtype
from shardq.files.cursor import Cursor, Fetch, fetching
from shardq.files.gguf import MAGIC, KeyValue
from shardq.files.gguf_read import GgufHeader, GgufTensor, scan_gguf
from shardq.importance_files import Entry, Provenance, short

_MAX_STRING_BYTES: Final = 1 << 20
_MAX_NAME_BYTES: Final = 256
_MAX_SLICES: Final = 1 << 16
_CHUNK_TOKENS: Final = 512  # llama-imatrix's default context, which the old format does not record


def read_imatrix(path: str, label: str) -> tuple[Provenance, dict[str, Entry]]:
    """The entries of an imatrix of either format, by llama.cpp's names; `label` is the file's name for messages.

    Values are not read, but for the counts. Raises BadImportance, SourceUnreadable.
    """
    try:
        with fetching(path, label) as (fetch, size_bytes):
            if fetch(0, min(len(MAGIC), size_bytes)) == MAGIC:
                return _read_gguf(scan_gguf(fetch, size_bytes, label), fetch, label)
            return _read_legacy(Cursor(fetch, size_bytes, label))
    except (CorruptShard, UnknownDtype) as error:
        raise BadImportance(f"importance {error}") from error


def _read_legacy(cursor: Cursor) -> tuple[Provenance, dict[str, Entry]]:
    """i32 number of entries; of each: i32 length and name, i32 calls, i32 number of values, F32 values times calls;
    then, in newer ones, i32 chunks, i32 length and name of the text."""
    count = _i32(cursor, "number of entries")
    if count < 1 or 12 * count > cursor.left_bytes:
        raise cursor.wrong(f"{count} entries")
    entries: dict[str, Entry] = {}
    for _ in range(count):
        name = cursor.text(_i32(cursor, "length of a name"), _MAX_NAME_BYTES, "name of an entry", "replace")
        calls = _i32(cursor, f"calls of {short(name)}")
        values = _i32(cursor, f"number of values of {short(name)}")
        if values < 1 or name in entries:
            raise cursor.wrong(f"{short(name)} has {values} values" if values < 1 else f"{short(name)} is there twice")
        entries[name] = Entry(cursor.position, values, (float(calls) if calls > 0 else 1.0,))
        cursor.skip(4 * values, f"values of {short(name)}")
    if not cursor.left_bytes:
        return Provenance("text"), entries
    chunks = _i32(cursor, "number of chunks")
    text = ""
    if cursor.left_bytes:
        length = _i32(cursor, "length of the text's name")
        text = cursor.text(length, _MAX_STRING_BYTES, "name of the text", "replace")
    return Provenance("text", max(0, chunks) * _CHUNK_TOKENS or None, text=_base(text)), entries


def _i32(cursor: Cursor, what: str) -> int:
    return cursor.whole(4, what, signed=True)


def _read_gguf(header: GgufHeader, fetch: Fetch, label: str) -> tuple[Provenance, dict[str, Entry]]:
    """`X.in_sum2` F32 [columns, slices] and `X.counts` F32 [1, slices]."""
    tensors = {t.name: t for t in header.tensors}
    entries = {}
    for name, tensor in tensors.items():
        stem = name.removesuffix(".in_sum2")
        if stem != name:
            entries[stem] = _gguf_entry(f"{label}, {short(stem)}", tensor, tensors.get(f"{stem}.counts"), fetch)
    if not entries:
        raise BadImportance(f"importance {label}: none of its {len(tensors)} tensors is of an imatrix (is it a model?)")
    return _gguf_provenance(header.pairs), entries


def _gguf_entry(where: str, sums: GgufTensor, counts: GgufTensor | None, fetch: Fetch) -> Entry:
    if counts is None or sums.type != "F32" or counts.type != "F32":
        raise BadImportance(f"importance {where}: expected F32 in_sum2 and counts; get the file again")
    slices, values = prod(counts.shape), prod(sums.shape)
    if not 1 <= slices <= _MAX_SLICES or values < 1 or values % slices:
        raise BadImportance(f"importance {where}: {slices} counts for {values} values; get the file again")
    found = struct.unpack(f"<{slices}f", fetch(counts.begin, 4 * slices))
    if not all(0 <= c < float("inf") for c in found):
        raise BadImportance(f"importance {where}: counts are negative or not finite; get the file again")
    return Entry(sums.begin, values, tuple(float(int(c + 0.5)) for c in found))


def _gguf_provenance(pairs: Mapping[str, KeyValue]) -> Provenance:
    said = {key: pair.value for key, pair in pairs.items()}
    chunks, size = said.get("imatrix.chunk_count"), said.get("imatrix.chunk_size")
    texts = said.get("imatrix.datasets")
    tokens = chunks * size if isinstance(chunks, int) and isinstance(size, int) else None
    names = [_base(str(t)) for t in texts] if isinstance(texts, tuple) else []
    return Provenance("text", tokens or None, text=", ".join(names))


def _base(path: str) -> str:
    """The file's name alone: where it lay is nobody's business. In one line."""
    name = re.split(r"[/\\]", path)[-1][:200]
    return "".join(c if c.isprintable() else "?" for c in name)
