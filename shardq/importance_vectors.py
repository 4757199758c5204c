"""Vectors of importance as workers take them: one read at a known place, and floored."""

import math
import os
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from shardq.errors import BadImportance, CorruptShard
from shardq.files.atomic import pread_exact, reading

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from shardq.regrouping import Regrouping

FLOOR: Final = 1e-4  # of the mean: reference quality.md, 6 D
SIXTEENTHS: Final = tuple(2.0 ** (i / 16) for i in range(16))


@dataclass(frozen=True, slots=True)
class Stamp:
    """A file as it was when it was checked."""

    path: str
    size_bytes: int
    changed_ns: int


def take_stamp(fd: int, path: str) -> Stamp:
    """That of an open file. Raises OSError."""
    status = os.fstat(fd)
    return Stamp(path, status.st_size, status.st_mtime_ns)


@dataclass(frozen=True, slots=True)
class VectorRef:
    """Where a worker finds the vector of one module: it travels with a task."""

    stamp: Stamp
    begin: int  # offset of its first value
    columns: int  # F32, little-endian
    divisor: float = 1.0
    slices: int = 1  # vectors that follow each other and are summed first; 0: nothing is known, all columns are equal
    powers: bytes = b""  # int8 exponents of two that inputs were multiplied by since, one a column; empty: none
    order: "Regrouping | None" = None  # in which the columns are then
    mean: int | None = None  # offset of the first mean of as many, of inputs themselves; None: none


@dataclass(frozen=True, slots=True)
class SizesRef:
    """Importance without data: by how large columns are, as a fold says."""

    sizes: bytes  # int8, sixteenths of log2, one a column
    power: int  # an error counts 2**(-power * size / 16)
    powers: bytes = b""  # as of VectorRef


@dataclass(frozen=True, slots=True)
class BothRef:
    """Importance from data, and sizes of columns: the root of what data says times what sizes say, which is better than
    either (bench/README.md). Sizes speak of what few data cannot, and the root takes back what these overstate."""

    data: VectorRef  # of inputs as they were
    sizes: SizesRef


Ref = VectorRef | SizesRef | BothRef


@dataclass(frozen=True, slots=True, eq=False)
class Means:
    """The second moments of a matrix' inputs as a diagonal and one direction: diag(spread) + means means^T, both F32
    [columns], read-only, times the power of two by which `weights_of` has the mean square in [1, 2)."""

    spread: "NDArray[np.float32]"  # mean x_j**2 less the square of the mean; at least FLOOR of the mean of all x_j**2
    means: "NDArray[np.float32]"


def has_means(ref: Ref) -> bool:
    """True if `read_means` has something to read."""
    data = ref.data if isinstance(ref, BothRef) else ref
    return isinstance(data, VectorRef) and data.mean is not None


def read_means(ref: Ref) -> Means:
    """Those of a vector that `has_means`, of inputs as they are after a fold. Raises as `read_vector`."""
    import numpy as np

    data = ref.data if isinstance(ref, BothRef) else ref
    assert isinstance(data, VectorRef)
    begin = data.mean
    assert begin is not None
    data = replace(data, powers=ref.sizes.powers) if isinstance(ref, BothRef) else data
    powers = np.frombuffer(data.powers, np.int8).astype(np.int32) if data.powers else np.int32(0)
    raw = np.ldexp(_stored(replace(data, begin=begin)).astype(np.float64), powers)
    means = data.order.apply(raw, 0) if data.order else raw
    squares = read_vector(data).astype(np.float64)
    mean = math.fsum(squares.tolist()) / len(squares)
    power = _power_of(mean)
    spread = np.ldexp(np.maximum(squares - means * means, FLOOR * mean), power).astype(np.float32)
    odd = power & 1
    moved = np.ldexp(means * (math.sqrt(2) if odd else 1.0), (power - odd) // 2).astype(np.float32)
    spread.setflags(write=False)
    moved.setflags(write=False)
    return Means(spread, moved)


def read_vector(ref: Ref) -> "NDArray[np.float32]":
    """The vector as it is: F32 [columns], mean x_j**2; ones where nothing is known.

    One read for a vector; a mean of slices is summed in double precision, slice by slice. Raises BadImportance when
    the file is another than the one that was checked, SourceUnreadable.
    """
    import numpy as np

    if isinstance(ref, BothRef):
        return np.sqrt(weights_of(read_vector(ref.data))) * read_vector(ref.sizes)
    powers = np.frombuffer(ref.powers, np.int8).astype(np.int32) if ref.powers else np.int32(0)
    if isinstance(ref, SizesRef):
        sixteenths = 32 * powers - ref.power * np.frombuffer(ref.sizes, np.int8).astype(np.int32)
        made: NDArray[np.float32] = np.ldexp(np.array(SIXTEENTHS, np.float32)[sixteenths & 15], sixteenths >> 4)
        return made
    with np.errstate(over="ignore"):
        moved: NDArray[np.float32] = np.ldexp(_stored(ref), 2 * powers)
    found: NDArray[np.float32] = np.minimum(moved, np.finfo(np.float32).max)
    return ref.order.apply(found, 0) if ref.order else found


def _stored(ref: VectorRef) -> "NDArray[np.float32]":
    import numpy as np

    if ref.slices == 0:
        return np.ones(ref.columns, np.float32)
    with reading(ref.stamp.path):
        fd = os.open(ref.stamp.path, os.O_RDONLY)
        try:
            if take_stamp(fd, ref.stamp.path) != ref.stamp:
                raise BadImportance(
                    f"importance {os.path.basename(ref.stamp.path)} has changed since the plan was made; start again"
                )
            if ref.slices == 1:
                return _slice(fd, ref, 0) / np.float32(ref.divisor)
            total = np.zeros(ref.columns, np.float64)
            for index in range(ref.slices):
                total += _slice(fd, ref, index)
        finally:
            os.close(fd)
    # what no token has reached is zero in an honest file; in another one a sum may exceed fp32
    return np.minimum(total / ref.divisor, np.finfo(np.float32).max).astype(np.float32)


def _slice(fd: int, ref: VectorRef, index: int) -> "NDArray[np.float32]":
    import numpy as np

    size_bytes = 4 * ref.columns
    what = f"importance {os.path.basename(ref.stamp.path)}"
    raw = np.frombuffer(read_span(fd, ref.begin + index * size_bytes, size_bytes, what), np.dtype("<f4"))
    return raw.astype(np.float32, copy=False)


def weights_of(values: "NDArray[Any]") -> "NDArray[np.float32]":
    """What a search multiplies squared errors by: mean x_j**2, floored at 1e-4 of its mean (quality.md, 6 D), times the
    power of two that brings the mean into [1, 2).

    Shape [columns], F32; values finite and not negative. The power changes no result of a search, in which scales of
    the weights cancel, and keeps products far from the ends of fp32. All zero: ones. The mean is exactly rounded.
    """
    import numpy as np

    wide = np.asarray(values, np.float64)
    mean = math.fsum(wide.tolist()) / len(wide)
    if mean == 0:
        return np.ones(len(wide), np.float32)
    return np.ldexp(np.maximum(wide, FLOOR * mean), _power_of(mean)).astype(np.float32)


def _power_of(mean: float) -> int:
    """That of two which brings a number above 0 into [1, 2)."""
    return 1 - math.frexp(mean)[1]


def read_span(fd: int, offset: int, size_bytes: int, what: str) -> bytearray:
    """Bytes of a file; `what` is for messages. Raises BadImportance where it ends early, SourceUnreadable."""
    data = bytearray(size_bytes)
    try:
        pread_exact(fd, memoryview(data), offset, what)
    except CorruptShard as error:
        raise BadImportance(str(error)) from error
    return data
