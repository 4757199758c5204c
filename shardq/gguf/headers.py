"""Headers of GGUF files, by ranges, and which files of a source are one model."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from shardq.files.gguf import KeyValue, Scalar
from shardq.files.gguf_read import GgufHeader, scan_gguf
from shardq.files.gguf_split import COUNT, NUMBER, TENSORS, part_name
from shardq.sources.base import Source, SourceFile, read_each

ENDING: Final = ".gguf"
NAME: Final = "general.name"
ARCHITECTURE: Final = "general.architecture"
FILE_TYPE: Final = "general.file_type"
_PART: Final = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
_FIRST_BYTES: Final = 256 << 10  # most parts but the first have headers that fit
_MORE_BYTES: Final = 4 << 20  # of vocabularies: one request for what the parser takes in many pieces

Headers = Mapping[str, GgufHeader]  # file -> header


@dataclass(frozen=True, slots=True)
class GgufModel:
    """The files of one model."""

    name: str  # of the only file without its ending, or what the names of the parts begin with
    files: tuple[SourceFile, ...]  # those that are there, in order
    count: int  # of parts, as names have it; 0 for a file that is called no part

    @property
    def names(self) -> tuple[str, ...]:
        """What its files are called, also those that are missing."""
        if self.count == 0:
            return tuple(f.name for f in self.files)
        return tuple(part_name(self.name, i, self.count) for i in range(self.count))


class _Reading:
    """Ranges of one file for a parser that goes on in small steps."""

    def __init__(self, source: Source, file: SourceFile) -> None:
        self._source, self._file = source, file
        self._held, self._begin = b"", 0

    def fetch(self, offset: int, count: int) -> bytes:
        """`count` bytes from `offset` on, which are there."""
        at = offset - self._begin
        if at < 0 or at + count > len(self._held):
            size = max(count, _MORE_BYTES if self._held else _FIRST_BYTES)
            self._held = self._source.read(self._file.name, offset, min(self._file.size_bytes, offset + size))
            self._begin, at = offset, 0
        return self._held[at : at + count]


def read_gguf_headers(source: Source, files: Sequence[SourceFile]) -> dict[str, GgufHeader]:
    """Headers of `files`, in their order; those on the network are read side by side.

    Raises CorruptShard, UnknownDtype, SourceUnreadable, HubAccess, HubTransfer.
    """
    return read_each(source, files, read_gguf_header)


def read_gguf_header(source: Source, file: SourceFile) -> GgufHeader:
    """The header of one file. Raises as read_gguf_headers."""
    return scan_gguf(_Reading(source, file).fetch, file.size_bytes, file.name)


def find_models(files: Sequence[SourceFile]) -> tuple[GgufModel, ...]:
    """The models that the GGUF files of a source are, at any depth, in the order of their names."""
    found: dict[tuple[str, int], list[SourceFile]] = {}
    for file in (f for f in files if f.name.endswith(ENDING)):
        part = _PART.fullmatch(file.name)
        is_part = part is not None and 0 < int(part["number"]) <= int(part["count"])
        key = (part["stem"], int(part["count"])) if part and is_part else (file.name.removesuffix(ENDING), 0)
        found.setdefault(key, []).append(file)
    return tuple(GgufModel(name, tuple(own), count) for (name, count), own in found.items())


def holds_gguf(files: Sequence[SourceFile]) -> bool:
    """True if there are GGUF files, at any depth, and no weights in safetensors at the top."""
    names = [f.name for f in files]
    has_others = any(".safetensors" in n and "/" not in n for n in names)
    return not has_others and any(n.endswith(ENDING) for n in names)


def check_parts(model: GgufModel, headers: Headers) -> Iterator[str]:
    """Where the parts of a model are not what their names and keys say; `headers`: of its files."""
    missing = [name for name in model.names if name not in headers]
    if missing:
        more = f" and {len(missing) - 1} more of {model.count} parts" if len(missing) > 1 else ""
        yield f"{missing[0]}{more} is missing: get it again"
    count = max(1, model.count)
    homes: dict[str, str] = {}
    for name in (n for n in model.names if n in headers):
        header, number = headers[name], model.names.index(name)
        said = said_value(header, COUNT)
        if said not in ({None, 1} if model.count == 0 else {count} if count > 1 else {None, 1}):
            yield f"{name} says that it is one of {show(said)} parts: expected {count}"
        elif (at := said_value(header, NUMBER)) not in ({None, 0} if count == 1 else {number}):
            yield f"{name} says that it is part {show(at)}, counted from 0: expected {number}"
        for t in header.tensors:
            if t.name in homes:
                yield f"tensor {t.name!a} is in {homes[t.name]} and in {name}"
            homes[t.name] = name
    if count > 1 and not missing:
        for name in model.names:
            if (said := said_value(headers[name], TENSORS)) != len(homes):
                yield f"{name} says that all parts have {show(said)} tensors: expected {len(homes)}"


def said_value(header: GgufHeader, key: str) -> Scalar | None:
    """The value of a key that has one, not several; None without it."""
    pair: KeyValue | None = header.pairs.get(key)
    return None if pair is None or isinstance(pair.value, tuple) else pair.value


def show(value: Scalar | None) -> str:
    """A value of a file for a message: short and ASCII."""
    return "nothing" if value is None else ascii(value)[:80]
