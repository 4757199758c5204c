"""The words of contract_blocks.py: near, hold, leader, half, and sums in order."""

from typing import Final

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Codes = NDArray[np.int32]
Truths = NDArray[np.bool_]
Octets = NDArray[np.uint8]

TINY: Final = np.float32(1e-15)
SHIFT: Final = np.float32(12582912.0)  # 1.5 * 2^23: adding it rounds to a whole number


def real(number: float) -> np.float32:
    """The fp32 number next to a Python one."""
    return np.float32(number)


def near(x: Floats) -> Codes:
    """The integer next to x, wrapped where it does not fit 23 bits."""
    return ((x + SHIFT).view(np.int32) & 0x7FFFFF) - 0x400000


def hold(codes: Codes, lowest: int, highest: int) -> Codes:
    """Integers, but not below or above."""
    return np.clip(codes, lowest, highest).astype(np.int32)


def total(x: Floats) -> Floats:
    """Sums over the last axis in order, from 0."""
    return np.asarray(np.add.accumulate(x, axis=-1, dtype=np.float32)[..., -1] + real(0))


def leader(x: Floats) -> Floats:
    """The first number of largest magnitude along the last axis; 0 of none that is above 0. NaN is passed over."""
    size = np.where(np.isnan(x), real(0), np.abs(x))
    first = np.take_along_axis(x, size.argmax(-1)[..., None], -1)[..., 0]
    return np.where(size.max(-1) > 0, first, real(0))


def smallest(x: Floats) -> Floats:
    """The first of the smallest numbers along the last axis: of zeros, the sign of the first."""
    at = (x == x.min(-1)[..., None]).argmax(-1)
    return np.take_along_axis(x, at[..., None], -1)[..., 0]


def quotient(a: Floats, b: Floats) -> Floats:
    """a / b."""
    return np.divide(a, b, dtype=np.float32)


def inverse(d: Floats) -> Floats:
    """1 / d; 0 of 0."""
    return np.where(d != 0, real(1) / d, real(0))


def halves(x: Floats) -> Floats:
    """Numbers as fp16 keeps them."""
    return x.astype(np.float16).astype(np.float32)


def half_bytes(x: Floats) -> Octets:
    """Numbers [N] as fp16, bytes [N, 2]."""
    return np.ascontiguousarray(x).astype("<f2").view(np.uint8).reshape(-1, 2)


def floats_of(octets: Octets) -> Floats:
    """fp16 bytes [N, 2] as numbers [N, 1]."""
    return np.ascontiguousarray(octets).view("<f2").astype(np.float32)


def nibbles(codes: Codes) -> Octets:
    """Codes [N, 32] as bytes [N, 16]: columns 0 to 15 low, 16 to 31 high."""
    return ((codes[:, :16] & 15) | (codes[:, 16:] & 15) << 4).astype(np.uint8)


def pairs(codes: Codes) -> Octets:
    """Two bits each of codes [N, 256] as bytes [N, 64]."""
    c = codes.reshape(-1, 2, 4, 32) & 3
    return (c[:, :, 0] | c[:, :, 1] << 2 | c[:, :, 2] << 4 | c[:, :, 3] << 6).astype(np.uint8).reshape(-1, 64)


def planes(bits: Codes) -> Octets:
    """One bit each of [N, 256] as bytes [N, 32]: bit k of byte l is that of column 32 k + l."""
    return np.packbits(bits.reshape(-1, 8, 32).astype(np.uint8), axis=1, bitorder="little").reshape(-1, 32)
