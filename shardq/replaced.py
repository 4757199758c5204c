"""Tensors that a tuning replaces: norms and biases whose values are others than the checkpoint's, under its names. They
lie beside codes that were tuned, and are written in place of what would be copied."""

import hashlib
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from shardq.errors import BadTuned
from shardq.files.atomic import pread_exact, reading
from shardq.formats import STORAGE
from shardq.importance_vectors import take_stamp

if TYPE_CHECKING:
    from shardq.decide import Decision
    from shardq.importance_vectors import Stamp
    from shardq.outputs import Output
    from shardq.sources.base import Source

SHOWN: Final = 4  # names told in a message
WINDOW_BYTES: Final = 8 << 20  # hashed at once


@dataclass(frozen=True, slots=True)
class Replaced:
    """The whole content of one tensor, in the type that the checkpoint stores it in."""

    dtype: str  # safetensors tag
    shape: tuple[int, ...]
    data: bytes


@dataclass(frozen=True, slots=True)
class ReplacedRef:
    """Where a worker finds the bytes of a tensor, or a part of them: it travels with a task."""

    stamp: "Stamp"
    begin: int  # in the file
    dtype: str
    shape: tuple[int, ...]
    sha256: str  # of the whole content

    def behind(self, offset_bytes: int) -> "ReplacedRef":
        """The same without its first bytes."""
        return replace(self, begin=self.begin + offset_bytes)


def match_replaced(
    decisions: Sequence["Decision"], refs: Mapping[str, ReplacedRef], label: str
) -> Mapping[str, ReplacedRef]:
    """What is written in place of tensors that a plan copies. Raises BadTuned for a tensor that the checkpoint does not
    have so, or that is not copied as it is."""
    there = {d.tensor.name: d for d in decisions}
    wrong = []
    for name, ref in refs.items():
        d = there.get(name)
        if d is None or d.action != "copy" or d.tensor.encoded or (d.tensor.dtype, d.tensor.shape) != (
            ref.dtype, ref.shape,
        ):  # fmt: skip
            wrong.append(name)
    if wrong:
        first = refs[wrong[0]]
        raise BadTuned(
            f"{label} replaces {', '.join(wrong[:SHOWN])}, the first as {first.dtype} {list(first.shape)}: expected "
            "tensors that the checkpoint has so and the output copies; tune with the source and options of the output"
        )
    return refs


def read_replaced(ref: ReplacedRef, begin: int, size_bytes: int) -> bytearray:
    """Some bytes of a tensor. Raises BadTuned when the file has changed since it was checked, SourceUnreadable."""
    path, data = ref.stamp.path, bytearray(size_bytes)
    with reading(path):
        fd = os.open(path, os.O_RDONLY)
        try:
            if take_stamp(fd, path) != ref.stamp:
                raise BadTuned(f"{os.path.basename(path)} has changed since the plan was made; start again")
            pread_exact(fd, memoryview(data), ref.begin + begin, path)
        finally:
            os.close(fd)
    return data


def read_whole(ref: ReplacedRef) -> Replaced:
    """All of a tensor. Raises as `read_replaced`."""
    size_bytes = math.prod(ref.shape) * STORAGE[ref.dtype].bits // 8
    return Replaced(ref.dtype, ref.shape, bytes(read_replaced(ref, 0, size_bytes)))


def check_replaced(output: "Output", extents: Mapping[str, tuple[str, int, int]]) -> Iterable[str]:
    """Tensors whose bytes are not those that the ledger records of what replaced them; `extents`: file, first byte and
    byte behind the last of each tensor. Raises what reading raises."""
    for name, entry in output.ledger["tensors"].items():
        if "replaced" in entry and name in extents:
            found = _digest(output.source, *extents[name])
            if found != entry.get("sha256"):
                yield (
                    f"{name} was replaced by {entry['replaced']} and has sha256 {found}: the ledger says "
                    f"{entry.get('sha256')}"
                )


def _digest(source: "Source", file: str, begin: int, end: int) -> str:
    digest = hashlib.sha256()
    for at in range(begin, end, WINDOW_BYTES):
        digest.update(source.read(file, at, min(end, at + WINDOW_BYTES)))
    return digest.hexdigest()
