"""Numbers as quantized checkpoints store them, with the values that they stand for. The formulas are written down anew
here, in plain numpy: nothing is shared with the readers that they are to judge."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Stored:
    """A tensor of a safetensors dtype; floats that numpy lacks are bit patterns."""

    dtype: str
    data: NDArray[Any]


@dataclass(frozen=True)
class Numbers:
    """What is stored, and the same as fp32."""

    stored: Stored
    values: Floats


Draw = Callable[[Generator, Shape], Numbers]


def small_floats(exponent_bits: int, mantissa_bits: int, bias: int) -> Floats:
    """The values of all codes of a sign, an exponent, and a mantissa, none of them special."""
    codes = np.arange(1 << (1 + exponent_bits + mantissa_bits))
    steps = 1 << mantissa_bits
    mantissa, exponent = codes % steps, codes // steps % (1 << exponent_bits)
    size = np.where(
        exponent == 0, mantissa / steps * 2.0 ** (1 - bias), (1 + mantissa / steps) * 2.0 ** (exponent - bias)
    )
    return np.where(codes >> (exponent_bits + mantissa_bits), -size, size).astype(np.float32)


E4M3: Final = small_floats(4, 3, 7)  # codes 0x7F and 0xFF are NaN, and are never drawn
E2M1: Final = small_floats(2, 1, 1)
E2M3: Final = small_floats(2, 3, 1)
NF4: Final = np.array(
    [-1.0, -0.6961928, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0.0, 0.0795803, 0.1609302,
     0.24611230, 0.33791524, 0.44070983, 0.56261700, 0.72295684, 1.0], np.float32,
)  # fmt: skip
FP4: Final = np.array(  # bitsandbytes' own order
    [0, 0.0052083333, 0.6666667, 1, 0.33333333, 0.5, 0.16666667, 0.25,
     0, -0.0052083333, -0.6666667, -1, -0.33333333, -0.5, -0.16666667, -0.25], np.float32,
)  # fmt: skip


# --- drawing -------------------------------------------------------------------------------------------------------


def draw_e4m3(rng: Generator, shape: Shape) -> Numbers:
    """Any e4m3 numbers: subnormals, both zeros, no NaN."""
    codes = rng.integers(0, 256, shape, np.uint8)
    codes[(codes & 0x7F) == 0x7F] = 0x80
    return Numbers(Stored("F8_E4M3", codes), E4M3[codes])


def draw_e4m3_scales(rng: Generator, shape: Shape) -> Numbers:
    """Positive e4m3 numbers from 2^-4 to 240."""
    codes = rng.integers(0x18, 0x78, shape, np.uint8)
    return Numbers(Stored("F8_E4M3", codes), E4M3[codes])


def draw_singles(rng: Generator, shape: Shape) -> Numbers:
    """fp32 scales of many sizes."""
    values = np.asarray(np.exp2(rng.uniform(-14, -8, shape)), np.float32)
    return Numbers(Stored("F32", values), values)


def draw_brains(rng: Generator, shape: Shape) -> Numbers:
    """The same as BF16."""
    bits = to_brain(draw_singles(rng, shape).values)
    return Numbers(Stored("BF16", bits), from_brain(bits))


def draw_halves(rng: Generator, shape: Shape) -> Numbers:
    """The same as F16."""
    values = draw_singles(rng, shape).values.astype(np.float16)
    return Numbers(Stored("F16", values), values.astype(np.float32))


def draw_powers(rng: Generator, shape: Shape) -> Numbers:
    """Exponent bytes: b is 2^(b - 127), here 2^-15 to 2^-6."""
    codes = rng.integers(112, 122, shape, np.uint8)
    return Numbers(Stored("U8", codes), np.exp2(codes.astype(np.float32) - 127))


def draw_e8m0(rng: Generator, shape: Shape) -> Numbers:
    """The same as F8_E8M0."""
    found = draw_powers(rng, shape)
    return Numbers(Stored("F8_E8M0", found.stored.data), found.values)


def draw_whole_powers(rng: Generator, shape: Shape) -> Numbers:
    """The same as F32."""
    values = draw_powers(rng, shape).values
    return Numbers(Stored("F32", values), values)


# --- conversions ---------------------------------------------------------------------------------------------------


def to_brain(values: Floats) -> NDArray[np.uint16]:
    """BF16 patterns of finite fp32 values, rounded half to even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + (bits >> np.uint64(16) & np.uint64(1))) >> np.uint64(16)).astype(np.uint16)


def from_brain(bits: NDArray[np.uint16]) -> Floats:
    """fp32 values of BF16 patterns."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def store_as(values: Floats, dtype: str) -> Stored:
    """fp32 values in BF16, F16 or F32, rounded half to even."""
    if dtype == "BF16":
        return Stored(dtype, to_brain(values))
    return Stored(dtype, np.ascontiguousarray(values, {"F16": np.float16, "F32": np.float32}[dtype]))


def spread(grid: Floats, block: tuple[int, int], shape: tuple[int, int]) -> Floats:
    """A matrix of `shape` with the number of its block at each place; the last blocks may be short."""
    return np.repeat(np.repeat(grid, block[0], 0)[: shape[0]], block[1], 1)[:, : shape[1]]


def pack_bytes(codes: NDArray[Any], bits: int) -> NDArray[np.uint8]:
    """The codes of each line as one stream of bits, least significant first, in bytes."""
    lines = codes.reshape(len(codes), -1).astype(np.uint8)
    stream = np.unpackbits(lines[..., None], axis=-1, bitorder="little")[..., :bits]
    return np.packbits(stream.reshape(len(lines), -1), axis=-1, bitorder="little")


def pack_words(codes: NDArray[Any], bits: int) -> NDArray[np.int32]:
    """The same in 32-bit words, the last one filled with zeros."""
    octets = pack_bytes(codes, bits)
    padded = np.pad(octets, ((0, 0), (0, -octets.shape[1] % 4)))
    return np.ascontiguousarray(padded).view(np.int32)
