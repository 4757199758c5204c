"""Importance of input channels: mean x_j**2 of every Linear layer, from a file, and the vector of every module.

Files: shardq's own (importance_files.py) and llama.cpp's imatrix (imatrix.py). Rules: quality.md, section 6 D. Nothing
here needs numpy before a file is loaded; what workers need is in importance_vectors.py.
"""

import hashlib
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from shardq.errors import BadImportance
from shardq.files.atomic import reading
from shardq.files.gguf import MAGIC
from shardq.imatrix import read_imatrix
from shardq.imatrix_names import Wanted, find_wanted
from shardq.importance_files import Entry, Provenance, find_entry, read_importance, short
from shardq.importance_vectors import Stamp, VectorRef, read_span, take_stamp

Format = Literal["shardq", "imatrix"]

RICH_TOKENS: Final = 4096  # from here on a search may turn a scale's sign: 6 A
LOW_BITS: Final = 3  # below, random ids must be many: 6 D
LOW_BITS_TOKENS: Final = 256
_PIECE_BYTES: Final = 4 << 20  # read at once
_SHOWN: Final = 6  # names in a message before "and N more"


@dataclass(frozen=True, slots=True)
class Importance:
    """A file of importance whose header and values are sound."""

    stamp: Stamp
    label: str  # the file's name
    sha256: str  # of the whole file: what makes outputs differ
    format: Format
    provenance: Provenance
    entries: Mapping[str, Entry]  # by module, see importance_files; of an imatrix by llama.cpp's tensor


def load_importance(path: str | os.PathLike[str]) -> Importance:
    """Read a file of either format and check it whole, in pieces: every value is finite and not negative, and none of
    the arrays is all zero (those of an imatrix that no token has reached may be).

    Raises BadImportance (damaged, hostile, something else), SourceUnreadable.
    """
    where, label = os.path.abspath(path), os.path.basename(path)
    with reading(where):
        fd = os.open(where, os.O_RDONLY)
        try:
            stamp = take_stamp(fd, where)
            start = os.pread(fd, 9, 0)
            own = start[:4] != MAGIC and start[8:] == b"{"
            provenance, entries = (read_importance if own else read_imatrix)(where, label)
            for entry, name in {e: n for n, e in entries.items()}.items():
                _check_values(fd, label, name, entry)
            digest = _sha256(fd, stamp.size_bytes)
            if take_stamp(fd, where) != stamp:
                raise BadImportance(f"importance {label} changed while it was read; wait until it is written")
        finally:
            os.close(fd)
    return Importance(stamp, label, digest, "shardq" if own else "imatrix", provenance, entries)


def match(importance: Importance, modules: Mapping[str, tuple[int, int]]) -> Mapping[str, VectorRef]:
    """The vector of every module; `modules` are those that need one, with rows and columns.

    Embeddings have no input and do not belong there. Reads nothing. Raises BadImportance with the modules that the file
    lacks, and with those whose vector has another length.
    """
    experts = _expert_counts(modules) if importance.format == "imatrix" else {}
    found: dict[str, VectorRef] = {}
    missing: list[str] = []
    wrong: list[str] = []
    for module, (_, columns) in modules.items():
        try:
            if importance.format == "shardq":
                ref = _own_vector(importance, module, columns)
            else:
                ref = _imatrix_vector(importance, module, columns, experts)
        except _WrongLength as error:
            wrong.append(f"{module} ({error})")
            continue
        if ref is None:
            missing.append(module)
        else:
            found[module] = ref
    if missing or wrong:
        raise BadImportance(_mismatch(importance.label, len(modules), missing, wrong))
    return found


def knows_means(provenance: Provenance) -> bool:
    """True where the means of inputs are those of what the model will read: by few or random ids scales that follow
    them lose (bench/README.md)."""
    return provenance.data == "text"


def stand_ins(vectors: Mapping[str, VectorRef]) -> tuple[str, ...]:
    """What the user should know of `match`'s result: modules whose own input was never seen. One sentence for each
    kind."""
    equal = [m for m, v in vectors.items() if v.slices == 0]
    borrowed = [m for m, v in vectors.items() if v.slices > 1]
    told = []
    if borrowed:
        told.append(f"Importance that is the mean over all experts or heads of the layer: {_listed(borrowed)}.")
    if equal:
        told.append(f"No token has reached these, and all their columns count the same: {_listed(equal)}.")
    return tuple(told)


def doubts(provenance: Provenance, bits: int) -> tuple[str, ...]:
    """What 6 D advises against, one sentence each."""
    tokens = provenance.tokens
    if bits >= LOW_BITS or provenance.data != "random ids" or tokens is None or tokens >= LOW_BITS_TOKENS:
        return ()
    advice = f"use {LOW_BITS_TOKENS} or more, or text"
    return (f"Importance from {tokens} random ids is weak below {LOW_BITS} bits: {advice}.",)


def allows_both_signs(provenance: Provenance, bits: int) -> bool:
    """True where a search may try a scale of either sign: from 4096 tokens on, or at 2 bits with text (6 A)."""
    rich = provenance.tokens is not None and provenance.tokens >= RICH_TOKENS
    return rich or (bits < LOW_BITS and provenance.data == "text")


class _WrongLength(Exception):
    """A vector that does not fit its module; the text says how."""


def _own_vector(importance: Importance, module: str, columns: int) -> VectorRef | None:
    entry = find_entry(importance.entries, module)
    if entry is None:
        return None
    if entry.values != columns:
        raise _WrongLength(f"{columns} columns, {entry.values} values")
    return VectorRef(importance.stamp, entry.begin, columns, mean=entry.mean)


def _expert_counts(modules: Mapping[str, tuple[int, int]]) -> Mapping[str, int]:
    """Stack -> experts that the modules show it to have."""
    counts: dict[str, int] = defaultdict(int)
    for module in modules:
        wanted = find_wanted(module)
        if wanted is not None and wanted.expert is not None:
            for tensor in wanted.tensors:
                counts[tensor] = max(counts[tensor], wanted.expert + 1)
    return counts


def _imatrix_vector(importance: Importance, module: str, columns: int, experts: Mapping[str, int]) -> VectorRef | None:
    wanted = find_wanted(module)
    if wanted is None:
        return None
    for tensor in wanted.tensors:
        entry = importance.entries.get(tensor)
        if entry is not None and wanted.expert is None:
            return _dense(importance.stamp, entry, columns)
        if entry is not None:
            return _expert(importance.stamp, entry, columns, wanted, experts[tensor])
    for tensor in wanted.averaged:
        entry = importance.entries.get(tensor)
        if entry is not None:
            return _average(importance.stamp, entry, columns, _slices(entry, columns))
    return None


def _dense(stamp: Stamp, entry: Entry, columns: int) -> VectorRef:
    if entry.values != columns or len(entry.counts) != 1:
        raise _WrongLength(f"{columns} columns, {entry.values} values")
    count = entry.counts[0]
    return VectorRef(stamp, entry.begin, columns, count) if count else _equal(stamp, columns)


def _expert(stamp: Stamp, entry: Entry, columns: int, wanted: Wanted, experts: int) -> VectorRef:
    """The slice of one expert. One that no token has reached: the mean of all tokens where all experts get the same
    input (6 D: gate and up have one vector for all), else equal columns, as llama.cpp has it."""
    assert wanted.expert is not None
    slices = _slices(entry, columns)
    # with a count for each slice its columns are certain; without, other columns may divide the values as well
    if slices < experts or (len(entry.counts) == 1 and slices != experts):
        raise _WrongLength(f"{experts} experts with {columns} columns, {entry.values} values")
    count = entry.counts[wanted.expert if len(entry.counts) > 1 else 0]
    if count:
        return VectorRef(stamp, entry.begin + 4 * columns * wanted.expert, columns, count)
    return _average(stamp, entry, columns, slices) if wanted.shared else _equal(stamp, columns)


def _slices(entry: Entry, columns: int) -> int:
    slices = entry.values // columns
    if entry.values % columns or len(entry.counts) not in (1, slices):
        raise _WrongLength(f"{columns} columns, {entry.values} values in {len(entry.counts)} slices")
    return slices


def _average(stamp: Stamp, entry: Entry, columns: int, slices: int) -> VectorRef:
    total = sum(entry.counts) * (slices if len(entry.counts) == 1 else 1)
    return VectorRef(stamp, entry.begin, columns, total, slices) if total else _equal(stamp, columns)


def _equal(stamp: Stamp, columns: int) -> VectorRef:
    return VectorRef(stamp, 0, columns, 1.0, 0)


def _mismatch(label: str, count: int, missing: Sequence[str], wrong: Sequence[str]) -> str:
    told = []
    if missing:
        told.append(f"lacks {len(missing)} of the {count} modules to be quantized: {_listed(missing)}")
    if wrong:
        told.append(f"does not fit {len(wrong)}: {_listed(wrong)}")
    return (
        f"importance {label} {' and '.join(told)}; make it from this model, or keep the modules in source precision "
        "with --ignore"
    )


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_SHOWN])
    return shown if len(names) <= _SHOWN else f"{shown} and {len(names) - _SHOWN} more"


def _check_values(fd: int, label: str, name: str, entry: Entry) -> None:
    import numpy as np

    where = f"importance {label}, entry {short(name)}"
    some = False
    for offset, size in _pieces(entry.begin, entry.size_bytes):
        values = np.frombuffer(read_span(fd, offset, size, where), np.dtype("<f4"))
        if not (np.isfinite(values).all() and (values >= 0).all()):
            raise BadImportance(f"{where}: values are negative or not finite; make the file again")
        some = some or bool(values.any())
    for offset, size in _pieces(entry.mean, entry.size_bytes) if entry.mean is not None else ():
        if not np.isfinite(np.frombuffer(read_span(fd, offset, size, where), np.dtype("<f4"))).all():
            raise BadImportance(f"{where}: means are not finite; make the file again")
    if not some and any(entry.counts):
        raise BadImportance(f"{where}: all values are zero; make the file again")


def _sha256(fd: int, size_bytes: int) -> str:
    digest = hashlib.sha256()
    for offset, size in _pieces(0, size_bytes):
        digest.update(read_span(fd, offset, size, "importance"))
    return digest.hexdigest()


def _pieces(begin: int, size_bytes: int) -> Iterator[tuple[int, int]]:
    for offset in range(begin, begin + size_bytes, _PIECE_BYTES):
        yield offset, min(_PIECE_BYTES, begin + size_bytes - offset)
