"""The safetensors container: a parser that trusts nothing, and headers that are known before any tensor is.

File: 8 bytes little-endian length N, N bytes of JSON, tensor data without holes. The rules are those of the safetensors
0.8.0 reader and writer; stricter here: duplicate names, unknown fields and a null `__metadata__` are refused.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, NoReturn

from shardq.errors import CorruptShard, LayoutRefuses, UnknownDtype
from shardq.files.atomic import pread_exact, reading
from shardq.formats import STORAGE, STORAGE_ORDER

PREFIX_BYTES: Final = 8
MAX_JSON_BYTES: Final = 100_000_000
METADATA_KEY: Final = "__metadata__"
PT_METADATA: Final[Mapping[str, str]] = {"format": "pt"}

_U64: Final = 1 << 64
_FIELDS: Final = {"dtype", "shape", "data_offsets"}


@dataclass(frozen=True, slots=True)
class HeaderTensor:
    """One tensor as the header describes it; `begin` and `end` count from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class Header:
    """A checked header."""

    metadata: Mapping[str, str]
    tensors: tuple[HeaderTensor, ...]  # in file order
    header_bytes_len: int  # prefix and JSON: where the tensor data begins
    sha256: str  # of the JSON bytes, padding included


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor to be written; `shape` counts logical elements, also for elements smaller than a byte."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class FilePlan:
    """Where everything lies in a file that does not exist yet."""

    header: bytes  # prefix included
    # name -> (begin, end) from the start of the file, in file order
    offsets: Mapping[str, tuple[int, int]]
    size_bytes: int


class _DuplicateKeyError(ValueError):
    """A key that occurs twice in one JSON object."""


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found: dict[str, object] = {}
    for key, value in pairs:
        if key in found:
            raise _DuplicateKeyError(key)
        found[key] = value
    return found


def _whole_number(text: str) -> int:
    # "-0" and numbers beyond 64 bits are no unsigned integers; refused here, before int() spends time on them.
    if text.startswith("-") or len(text) > 20 or int(text) >= _U64:
        raise ValueError(f"{text[:24]} is not an unsigned 64-bit integer")
    return int(text)


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not JSON")


def _json_bytes_count(prefix: bytes, file_size_bytes: int, shard: str) -> int:
    """N of the 8-byte prefix, checked against the file's size and the format's limit."""
    if file_size_bytes < PREFIX_BYTES or len(prefix) < PREFIX_BYTES:
        raise CorruptShard(
            f"shard {shard} is truncated: {file_size_bytes} bytes, "
            f"a safetensors file begins with {PREFIX_BYTES}; get the file again"
        )
    count = int.from_bytes(prefix[:PREFIX_BYTES], "little")
    if count > MAX_JSON_BYTES:
        raise CorruptShard(
            f"shard {shard} claims a header of {count} bytes, the format allows {MAX_JSON_BYTES}: "
            "not a safetensors file, or damaged; get the file again"
        )
    if PREFIX_BYTES + count > file_size_bytes:
        raise CorruptShard(
            f"shard {shard} is truncated: its header needs {PREFIX_BYTES + count} bytes, "
            f"the file has {file_size_bytes}; get the file again"
        )
    return count


def header_span(prefix: bytes, file_size_bytes: int, shard: str) -> int:
    """Bytes from the start of the file that hold prefix and JSON; what `parse_header` needs.

    `prefix` is at least the first 8 bytes. Raises CorruptShard when the length is impossible.
    """
    return PREFIX_BYTES + _json_bytes_count(prefix, file_size_bytes, shard)


def parse_header(raw: bytes, file_size_bytes: int, shard: str) -> Header:
    """Check and read the header in `raw`, the first bytes of a file of `file_size_bytes`.

    `raw` may be longer than the header, not shorter. Raises CorruptShard (names shard and tensor), UnknownDtype.
    """
    count = _json_bytes_count(raw, file_size_bytes, shard)
    body = raw[PREFIX_BYTES : PREFIX_BYTES + count]
    if len(body) < count:
        raise CorruptShard(f"shard {shard} is truncated: {len(body)} of {count} header bytes; get the file again")
    entries = _decode(body, shard)
    metadata = _metadata(entries.pop(METADATA_KEY, {}), shard)
    data_begin = PREFIX_BYTES + count
    tensors = [_entry(name, value, data_begin, shard) for name, value in entries.items()]
    tensors.sort(key=lambda t: (t.begin, t.end))
    _check_cover(tensors, data_begin, file_size_bytes, shard)
    return Header(metadata, tuple(tensors), data_begin, hashlib.sha256(body).hexdigest())


def read_header(path: str | os.PathLike[str], shard: str | None = None) -> Header:
    """Read the header of a local file: 8 bytes, then the JSON, nothing else.

    `shard` is the name for messages, by default the file name. Raises CorruptShard, UnknownDtype, SourceUnreadable.
    """
    name = shard or os.path.basename(path)
    with reading(path):
        fd = os.open(path, os.O_RDONLY)
        try:
            size_bytes = os.fstat(fd).st_size
            raw = bytearray(min(PREFIX_BYTES, size_bytes))
            pread_exact(fd, memoryview(raw), 0, f"shard {name}")
            raw = bytearray(header_span(bytes(raw), size_bytes, name))
            pread_exact(fd, memoryview(raw), 0, f"shard {name}")
        finally:
            os.close(fd)
    return parse_header(bytes(raw), size_bytes, name)


def _decode(body: bytes, shard: str) -> dict[str, object]:
    try:
        entries = json.loads(
            body.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_int=_whole_number,
            parse_constant=_no_constant,
        )
    except _DuplicateKeyError as error:
        raise CorruptShard(
            f"shard {shard}: {_brief(str(error))} occurs twice in the header; refusing to pick one"
        ) from error
    except (ValueError, RecursionError) as error:  # wrong UTF-8 and wrong JSON are ValueErrors
        raise CorruptShard(f"shard {shard}: the header is not valid JSON ({error}); get the file again") from error
    if not isinstance(entries, dict):
        raise CorruptShard(f"shard {shard}: the header is not a JSON object; get the file again")
    for name in entries:
        if not _encodable(name):
            raise CorruptShard(f"shard {shard}: tensor name {_brief(name)} is not valid Unicode")
    return entries


def _brief(value: object) -> str:
    """`value` for a message: ASCII, one line, cut, since a hostile header can hold megabytes."""
    text = ascii(value)
    return text if len(text) <= 160 else text[:160] + "..."


def _encodable(text: str) -> bool:
    """False for lone surrogates, which JSON escapes can spell but UTF-8 cannot hold."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _metadata(value: object, shard: str) -> dict[str, str]:
    found: dict[str, str] = {}
    if not isinstance(value, dict):
        raise CorruptShard(f"shard {shard}: {METADATA_KEY} is not an object of strings")
    for key, text in value.items():
        if not isinstance(text, str) or not _encodable(key + text):
            raise CorruptShard(f"shard {shard}: {METADATA_KEY} entry {_brief(key)} is not a string")
        found[key] = text
    return found


def _entry(name: str, value: object, data_begin: int, shard: str) -> HeaderTensor:
    """One tensor of the header, checked by itself."""
    where = f"shard {shard}, tensor {_brief(name)}"
    if not isinstance(value, dict) or set(value) != _FIELDS:
        raise CorruptShard(f"{where}: expected the fields {', '.join(sorted(_FIELDS))}")
    dtype = value["dtype"]
    if not isinstance(dtype, str):
        raise CorruptShard(f"{where}: dtype is not a string")
    if dtype not in STORAGE:
        raise UnknownDtype(f"{where}: unknown dtype {_brief(dtype)}; known are {', '.join(STORAGE)}")
    shape = _numbers(value["shape"], f"{where}: shape")
    offsets = _numbers(value["data_offsets"], f"{where}: data_offsets")
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CorruptShard(f"{where}: data_offsets {_brief(list(offsets))} are not a begin and an end")
    try:
        expected = tensor_bytes(dtype, shape)
    except ValueError as error:
        raise CorruptShard(f"{where}: {error}") from error
    if offsets[1] - offsets[0] != expected:
        raise CorruptShard(
            f"{where}: shape {_brief(list(shape))} of {dtype} needs {expected} bytes, "
            f"the header gives {offsets[1] - offsets[0]}; the file is damaged or lies"
        )
    return HeaderTensor(name, dtype, shape, data_begin + offsets[0], data_begin + offsets[1])


def _numbers(value: object, where: str) -> tuple[int, ...]:
    # bool is an int to isinstance; type() is the exact test. Signs and sizes were checked while decoding.
    if not isinstance(value, list) or any(type(v) is not int for v in value):
        raise CorruptShard(f"{where} is not a list of unsigned integers")
    return tuple(value)


def tensor_bytes(dtype: str, shape: Sequence[int]) -> int:
    """Bytes of a tensor of a known dtype. Raises ValueError on 64-bit overflow and when it does not end on a byte."""
    elements = 1
    for dimension in shape:
        elements *= dimension
        # checked at each step like the reference reader, which a later 0 does not save
        if elements >= _U64:
            raise ValueError(f"shape {_brief(list(shape))} overflows 64 bits")
    bits = elements * STORAGE[dtype].bits
    if bits >= _U64:
        raise ValueError(f"shape {_brief(list(shape))} of {dtype} overflows 64 bits")
    if bits % 8:
        raise ValueError(f"shape {_brief(list(shape))} of {dtype} does not end on a whole byte")
    return bits // 8


def _check_cover(tensors: Sequence[HeaderTensor], data_begin: int, file_size_bytes: int, shard: str) -> None:
    """Every byte behind the header belongs to exactly one tensor."""
    position = data_begin
    for tensor in tensors:
        if tensor.begin != position:
            kind = "overlaps the tensor" if tensor.begin < position else "leaves a hole"
            raise CorruptShard(
                f"shard {shard}, tensor {_brief(tensor.name)} {kind} before it: "
                f"begins at byte {tensor.begin}, expected {position}; get the file again"
            )
        position = tensor.end
    if position > file_size_bytes:
        cut = next(t for t in tensors if t.end > file_size_bytes)
        raise CorruptShard(
            f"shard {shard} is truncated: {file_size_bytes} bytes, the header needs {position} "
            f"(first tensor cut: {_brief(cut.name)}); get the file again"
        )
    if position < file_size_bytes:
        raise CorruptShard(
            f"shard {shard} has {file_size_bytes - position} trailing bytes: "
            f"{file_size_bytes} bytes, the header accounts for {position}; get the file again"
        )


def plan_file(tensors: Sequence[TensorSpec], metadata: Mapping[str, str] | None = PT_METADATA) -> FilePlan:
    """Header, offsets and size of the file that `safetensors.torch.save_file` writes for the same tensors, to the byte.

    Order: by dtype (`STORAGE_ORDER`, high first), then name; JSON without spaces, padded with spaces to 8 bytes.
    `metadata` None writes no `__metadata__`. Its entries keep their order (the reference writer's is random from two
    on). Raises ValueError for a repeated or impossible name, dtype or shape, LayoutRefuses over the header limit.
    """
    entries: dict[str, object] = {} if metadata is None else {METADATA_KEY: dict(metadata)}
    spans: dict[str, tuple[int, int]] = {}
    position = 0
    for spec in sorted(tensors, key=lambda s: (-STORAGE_ORDER[s.dtype], s.name)):
        if spec.name in entries or spec.name == METADATA_KEY or not _encodable(spec.name):
            raise ValueError(f"tensor name {spec.name!a} is repeated or cannot be written")
        if any(d < 0 for d in spec.shape):
            raise ValueError(f"tensor {spec.name!r} has a negative dimension: {list(spec.shape)}")
        end = position + tensor_bytes(spec.dtype, spec.shape)
        entries[spec.name] = {
            "dtype": spec.dtype,
            "shape": spec.shape,
            "data_offsets": (position, end),
        }
        spans[spec.name] = (position, end)
        position = end
    body = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    body += b" " * (-len(body) % 8)
    if len(body) > MAX_JSON_BYTES:
        raise LayoutRefuses(
            f"{len(tensors)} tensors in one file need a header of {len(body)} bytes, "
            f"safetensors allows {MAX_JSON_BYTES}; use smaller shards"
        )
    begin = PREFIX_BYTES + len(body)
    offsets = {name: (begin + a, begin + b) for name, (a, b) in spans.items()}
    return FilePlan(len(body).to_bytes(PREFIX_BYTES, "little") + body, offsets, begin + position)
