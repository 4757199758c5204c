"""Formats without a search: one scale, then every code by itself."""

from typing import Final

import numpy as np

from shardq.kernels.reference.blocks.arithmetic import (
    Codes,
    Floats,
    Octets,
    half_bytes,
    halves,
    inverse,
    leader,
    nibbles,
    pairs,
    real,
    smallest,
)

MXFP4_VALUES: Final = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.float32)


def _codes(x: Floats, d: Floats, shift: float) -> Codes:
    """trunc(x / d + shift); all 0 where 1 / d is infinite."""
    by = inverse(d)[:, None]
    usable = np.isfinite(by)
    return np.where(usable, x * np.where(usable, by, real(0)) + real(shift), real(0)).astype(np.int32)


def _rounded(x: Floats, d: Floats) -> Codes:
    """x / d, half away from zero; 0 where 1 / d is infinite."""
    by = inverse(d)[:, None]
    quotient = x * np.where(np.isfinite(by), by, real(0))
    whole = np.trunc(quotient)
    up = np.abs(quotient - whole) >= real(0.5)
    return (whole + np.where(up, np.sign(quotient), real(0))).astype(np.int32)


def with_fifths(scales: list[Floats], codes: Codes, bits: int) -> tuple[Octets, Floats]:
    """Scales, fifth bits if there are five, nibbles; and the scales as stored [N, scales]."""
    parts = [half_bytes(scale) for scale in scales]
    if bits == 5:
        parts.append(np.packbits((codes >> 4 & 1).astype(np.uint8), axis=1, bitorder="little"))
    return np.concatenate([*parts, nibbles(codes)], 1), halves(np.stack(scales, 1))


def signed(x: Floats, bits: int) -> tuple[Octets, Floats]:
    """Q4_0 and Q5_0 of blocks [N, 32]."""
    half = 1 << bits - 1
    d = leader(x) / real(-half)
    return with_fifths([d], np.minimum(_codes(x, d, half + 0.5), 2 * half - 1), bits)


def affine(x: Floats, bits: int) -> tuple[Octets, Floats]:
    """Q4_1 and Q5_1 of blocks [N, 32]."""
    top = (1 << bits) - 1
    least = smallest(x)
    d = (-smallest(-x) - least) / real(top)
    return with_fifths([d, least], np.minimum(_codes(x - least[:, None], d, 0.5), top), bits)


def bytes8(x: Floats) -> tuple[Octets, Floats]:
    """Q8_0 of blocks [N, 32]."""
    d = np.abs(x).max(1) / real(127)
    return np.concatenate([half_bytes(d), _rounded(x, d).astype(np.int8).view(np.uint8)], 1), halves(d[:, None])


def _packed_trits(trits: Codes) -> Octets:
    """Trits [N, 5, n] as bytes [N, n]."""
    number = np.zeros_like(trits[:, 0])
    for i in range(5):
        number = number * 3 + trits[:, i]
    return ((number * 256 + 242) // 243).astype(np.uint8)


def ternary(x: Floats, fives: bool) -> tuple[Octets, Floats]:
    """TQ1_0 (fives) and TQ2_0 of blocks [N, 256]."""
    d = np.abs(x).max(1)
    trits = _rounded(x, d) + 1
    if not fives:
        return np.concatenate([pairs(trits), half_bytes(d)], 1), halves(d[:, None])
    last = np.pad(trits[:, 240:].reshape(-1, 4, 4), ((0, 0), (0, 1), (0, 0)))
    parts = (trits[:, :160].reshape(-1, 5, 32), trits[:, 160:240].reshape(-1, 5, 16), last)
    return np.concatenate([*(_packed_trits(p) for p in parts), half_bytes(d)], 1), halves(d[:, None])


def mxfp4(x: Floats) -> tuple[Octets, Floats]:
    """MXFP4 of blocks [N, 32]; its scale is always finite."""
    most = np.abs(x).max(1)
    with np.errstate(divide="ignore"):
        logarithm = np.floor(np.log2(most.astype(np.float64)).astype(np.float32))
    exponent = np.where(most > 0, logarithm + real(125), real(0)).astype(np.int32) & 255
    scale = np.ldexp(1.0, exponent - 128).astype(np.float32)
    errors = np.abs(MXFP4_VALUES * scale[:, None, None] - x[:, :, None])
    codes = errors.argmin(2).astype(np.int32)
    return np.concatenate([exponent[:, None].astype(np.uint8), nibbles(codes)], 1), np.zeros((len(x), 1), np.float32)
