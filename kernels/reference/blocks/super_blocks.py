"""Formats whose sub-blocks have coded scales: Q2_K to Q6_K, and the two with a table."""

import numpy as np

from shardq.kernels.reference.blocks.arithmetic import (
    TINY,
    Codes,
    Floats,
    Octets,
    half_bytes,
    halves,
    hold,
    inverse,
    leader,
    near,
    nibbles,
    pairs,
    planes,
    real,
    total,
)
from shardq.kernels.reference.blocks.searches import (
    IMPORTANT_STEPS,
    Line,
    descent,
    line,
    plus,
    ray,
    table,
    table_index,
)


def weighed(x: Floats, importance: Floats, factor: float) -> Floats:
    """Weights of errors in blocks [N, columns], by the mean of their squares times the factor."""
    mean = real(factor) * total(x * x) / real(x.shape[1])
    return importance * np.sqrt(mean[:, None] + x * x)


def _scales_by_largest(x: Floats, top: int) -> tuple[Codes, Floats]:
    """Codes and unit of scales [N, subs]."""
    most, highest = np.maximum(np.where(np.isnan(x), real(0), x).max(1), real(0)), real(top)
    by = np.where(most > 0, highest / most, real(0))
    codes = near(by[:, None] * x) & 255
    return (np.minimum(codes, top) if top == 63 else codes), np.where(most > 0, most / highest, real(0))


def _line_blocks(x: Floats, importance: Floats | None, sub: int, top: int, factor: float) -> tuple[Line, Floats | None]:
    """The search in sub-blocks of blocks [N, 256], and what a sub-block weighs if there is importance."""
    subs = x.reshape(-1, sub)
    if importance is not None:
        w = weighed(x, importance, factor).reshape(-1, sub)
        return line(subs, w, top, IMPORTANT_STEPS), total(w).reshape(len(x), -1)
    if sub == 16:
        return line(subs, np.abs(subs), top, (-0.5, 0.1, 16), absolute=True), None
    w = np.sqrt(total(subs * subs) / real(sub))[:, None] + np.abs(subs)
    return line(subs, w, top, (-1.0, 0.1, 21) if top == 15 else (-0.5, 0.1, 16)), None


def line_k(x: Floats, importance: Floats | None, bits: int) -> tuple[Octets, Floats]:
    """Q2_K, Q4_K and Q5_K of blocks [N, 256]."""
    sub, top = (16 if bits == 2 else 32), (1 << bits) - 1
    highest = 15 if bits == 2 else 63
    found, sums = _line_blocks(x, importance, sub, top, 1.0 if bits == 2 else 2.0)
    scale, least = found.scale.reshape(len(x), -1), found.least.reshape(len(x), -1)
    if sums is None:
        (scales, d), (minima, m) = _scales_by_largest(scale, highest), _scales_by_largest(least, highest)
    else:
        first, second = plus(scale, sums, highest), plus(least, sums, highest)
        scales, d, minima, m = first.codes, first.scale, second.codes, second.scale
    if bits == 2:
        both = (scales | minima << 4) & 255
        head = both.astype(np.uint8)
        scales, minima = both & 15, both >> 4
    else:
        head = np.concatenate(
            [
                scales[:, :4] | scales[:, 4:] >> 4 << 6,
                minima[:, :4] | minima[:, 4:] >> 4 << 6,
                (scales[:, 4:] & 15) | (minima[:, 4:] & 15) << 4,
            ],
            1,
        ).astype(np.uint8)
    step = (halves(d)[:, None] * scales.astype(np.float32)).reshape(-1, 1)
    low = (halves(m)[:, None] * minima.astype(np.float32)).reshape(-1, 1)
    codes = np.where(step != 0, hold(near((x.reshape(-1, sub) + low) / step), 0, top), found.codes).reshape(-1, 256)
    stored = halves(np.stack([d, m], 1))
    if bits == 2:
        return np.concatenate([head, pairs(codes), half_bytes(d), half_bytes(m)], 1), stored
    fifths = [planes(codes >> 4)] if bits == 5 else []
    c = codes.reshape(-1, 4, 2, 32) & 15
    packed = (c[:, :, 0] | c[:, :, 1] << 4).astype(np.uint8).reshape(-1, 128)
    return np.concatenate([half_bytes(d), half_bytes(m), head, *fifths, packed], 1), stored


def q3_k(x: Floats, importance: Floats | None) -> tuple[Octets, Floats]:
    """Q3_K of blocks [N, 256]."""
    subs = x.reshape(-1, 16)
    if importance is None:
        found = descent(subs, 4)
        scale = found.scale.reshape(-1, 16)
        head = leader(scale)
        by = real(-32) / head
        code = near(by[:, None] * scale).astype(np.int8).astype(np.int32)
        scales = np.where(head[:, None] != 0, hold(code, -32, 31) + 32, 0)
        d = np.where(head != 0, real(1) / by, real(0))
    else:
        w = weighed(x, importance, 2.0).reshape(-1, 16)
        found = ray(subs, w, 4)
        block = ray(found.scale.reshape(-1, 16), total(w).reshape(-1, 16), 32)
        scales, d = block.codes, block.scale
    step = (halves(d)[:, None] * (scales - 32).astype(np.float32)).reshape(-1, 1)
    codes = np.where(step != 0, hold(near(subs / step), -4, 3) + 4, found.codes).reshape(-1, 256)
    low = (scales[:, :8] & 15) | (scales[:, 8:] & 15) << 4
    high = np.zeros((len(x), 4), np.int32)
    for j in range(16):
        high[:, j % 4] |= scales[:, j] >> 4 << j // 4 * 2
    parts = [planes(codes >> 2), pairs(codes), low.astype(np.uint8), high.astype(np.uint8), half_bytes(d)]
    return np.concatenate(parts, 1), halves(d[:, None])


def q6_k(x: Floats, importance: Floats | None) -> tuple[Octets, Floats]:
    """Q6_K of blocks [N, 256]."""
    subs = x.reshape(-1, 16)
    found = ray(subs, subs * subs if importance is None else importance.reshape(-1, 16), 32)
    scale = found.scale.reshape(-1, 16)
    head = leader(scale)
    empty = np.abs(head) < TINY
    by = real(-128) / head
    scales = np.minimum(near(by[:, None] * scale), 127).astype(np.int8)
    d = np.where(empty, real(0), real(1) / by)
    step = (halves(d)[:, None] * scales.astype(np.float32)).reshape(-1, 1)
    codes = np.where(step != 0, hold(near(subs / step), -32, 31) + 32, found.codes).reshape(-1, 2, 2, 64)
    low = ((codes[:, :, 0] & 15) | (codes[:, :, 1] & 15) << 4).astype(np.uint8).reshape(-1, 128)
    made = np.concatenate([low, pairs(codes.reshape(-1, 256) >> 4), scales.view(np.uint8), half_bytes(d)], 1)
    return np.where(empty[:, None], np.uint8(0), made), halves(d[:, None])


def table_blocks(x: Floats, importance: Floats | None) -> tuple[Octets, Floats]:
    """IQ4_NL of blocks [N, 32] and IQ4_XS of blocks [N, 256]."""
    subs = x.reshape(-1, 32)
    mean = total(x * x) * (real(2) / real(x.shape[1]))
    w = x * x if importance is None else importance * np.sqrt(mean[:, None] + x * x)
    scale = table(subs, w.reshape(-1, 32)).reshape(len(x), -1)
    if x.shape[1] == 32:
        d = scale[:, 0]
        codes = table_index(inverse(scale) * x)
        return np.concatenate([half_bytes(d), nibbles(codes)], 1), halves(d[:, None])
    d = -leader(scale) / real(32)
    level = hold(near(inverse(d)[:, None] * scale), -32, 31)
    step = (d[:, None] * level.astype(np.float32)).reshape(-1)
    packed = nibbles(table_index(inverse(step)[:, None] * subs)).reshape(-1, 128)
    plus_half = level + 32
    high = (plus_half >> 4 << np.arange(0, 16, 2, dtype=np.int32)).sum(1).astype("<u2").view(np.uint8).reshape(-1, 2)
    low = ((plus_half[:, ::2] & 15) | (plus_half[:, 1::2] & 15) << 4).astype(np.uint8)
    return np.concatenate([half_bytes(d), high, low, packed], 1), halves(d[:, None])
