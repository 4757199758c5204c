"""The searches of contract_blocks.py: line, ray, descent, table and plus, over sub-blocks [N, n] at once."""

from dataclasses import dataclass
from typing import Final

import numpy as np

from shardq.kernels.reference.blocks.arithmetic import (
    TINY,
    Codes,
    Floats,
    hold,
    leader,
    near,
    quotient,
    real,
    smallest,
    total,
)

TABLE: Final = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32)
IMPORTANT_STEPS: Final = (-0.9, 0.05, 37)


@dataclass(frozen=True, slots=True)
class Line:
    """Scales and minima [N], codes [N, n]."""

    scale: Floats
    least: Floats
    codes: Codes


@dataclass(frozen=True, slots=True)
class Ray:
    """Scales [N] and codes [N, n]; codes are plus half, or 0 where all numbers are tiny."""

    scale: Floats
    codes: Codes


def _line_error(x: Floats, w: Floats, scale: Floats, low: Floats, codes: Codes, absolute: bool) -> Floats:
    difference = scale[:, None] * codes.astype(np.float32) + low[:, None] - x
    return total(w * (np.abs(difference) if absolute else difference * difference))


def line(x: Floats, w: Floats, top: int, steps: tuple[float, float, int], absolute: bool = False) -> Line:
    """make_qkx2_quants and make_qkx3_quants; steps are the first, the step, and their number."""
    ones, weights = total(w), total(w * x)
    low = smallest(x)
    flat_low = low = np.where(low > 0, real(0), low)
    most, highest = x.max(1), real(top)
    inverse = highest / (most - low)
    codes = hold(near(inverse[:, None] * (x - low[:, None])), 0, top)
    scale = real(1) / inverse
    best = _line_error(x, w, scale, low, codes, absolute)
    for i in range(steps[2]):
        inverse = (real(steps[0]) + real(steps[1]) * real(i) + highest) / (most - low)
        tried = hold(near(inverse[:, None] * (x - low[:, None])), 0, top)
        level = tried.astype(np.float32)
        one, square, product = total(w * level), total(w * level * level), total(w * level * x)
        determinant = ones * square - one * one
        fit = quotient(ones * product - weights * one, determinant)
        least = quotient(square * weights - one * product, determinant)
        fit, least = np.where(least > 0, quotient(product, square), fit), np.where(least > 0, real(0), least)
        error = _line_error(x, w, fit, least, tried, absolute)
        better = (determinant > 0) & (error < best)
        codes = np.where(better[:, None], tried, codes)
        best, scale, low = (np.where(better, a, b) for a, b in ((error, best), (fit, scale), (least, low)))
    flat = most == flat_low
    return Line(np.where(flat, real(0), scale), -np.where(flat, flat_low, low), np.where(flat[:, None], 0, codes))


def _ray_codes(x: Floats, inverse: Floats, half: int) -> Codes:
    return hold(near(inverse[:, None] * x), -half, half - 1)


def ray(x: Floats, w: Floats, half: int) -> Ray:
    """make_qx_quants with its first kind of error."""
    head, highest = leader(x), real(half)
    codes = scale = best = None
    for i in (0, *range(-9, 0), *range(1, 10)):
        inverse = -highest / head if i == 0 else -(highest + real(0.1) * real(i)) / head
        tried = _ray_codes(x, inverse, half)
        level = tried.astype(np.float32)
        product, square = total(w * x * level), total(w * level * level)
        fit = quotient(product, square)
        if codes is None or scale is None or best is None:
            codes, scale = tried, np.where(square != 0, fit, real(0))
            best = scale * product
            continue
        better = (square > 0) & (product * product > best * square)
        codes = np.where(better[:, None], tried, codes)
        scale, best = np.where(better, fit, scale), np.where(better, fit * product, best)
    assert codes is not None
    assert scale is not None
    tiny = np.abs(head) < TINY
    return Ray(np.where(tiny, real(0), scale), np.where(tiny[:, None], 0, codes + half))


def descent(x: Floats, half: int) -> Ray:
    """make_q3_quants."""
    head, w = leader(x), x * x
    codes = _ray_codes(x, real(-half) / head, half)
    level = codes.astype(np.float32)
    product, square = total(w * x * level), total(w * level * level)
    for _ in range(5):
        before = codes.copy()
        for i in range(x.shape[1]):
            xi, wi, level = x[:, i], w[:, i], codes[:, i].astype(np.float32)
            a, b = product - wi * xi * level, square - wi * level * level
            tried = hold(near(quotient(xi * b, a)), -half, half - 1)
            other = tried.astype(np.float32)
            new_a, new_b = a + wi * xi * other, b + wi * other * other
            better = (a > 0) & (tried != codes[:, i]) & (new_b > 0)
            better &= new_a * new_a * square > product * product * new_b
            codes[:, i] = np.where(better, tried, codes[:, i])
            product, square = np.where(better, new_a, product), np.where(better, new_b, square)
        if np.array_equal(before, codes):
            break
    tiny = np.abs(head) < TINY
    scale = np.where(square > 0, quotient(product, square), real(0))
    return Ray(np.where(tiny, real(0), scale), np.where(tiny[:, None], 0, codes + half))


def table_index(v: Floats) -> Codes:
    """The nearest value of the table, of two the upper; a NaN is the last."""
    middles = (TABLE[1:] + TABLE[:-1]) / real(2)
    above: Codes = (~(v[..., None] < middles)).sum(-1).astype(np.int32)
    return above


def table(x: Floats, w: Floats) -> Floats:
    """Scales of IQ4_NL and IQ4_XS."""
    head = leader(x)
    scale = best = None
    for i in (None, *range(-7, 8)):
        inverse = real(1) / (-head / TABLE[0]) if i is None else (real(i) + TABLE[0]) / head
        value = TABLE[table_index(inverse[:, None] * x)]
        product, square = total(w * value * x), total(w * value * value)
        fit = quotient(product, square)
        if scale is None or best is None:
            scale = np.where(square > 0, fit, real(0))
            best = scale * product
            continue
        better = (square > 0) & (product * product > best * square)
        scale, best = np.where(better, fit, scale), np.where(better, fit * product, best)
    assert scale is not None
    return np.where(np.abs(head) < TINY, real(0), scale)


def plus(x: Floats, w: Floats, top: int) -> Ray:
    """make_qp_quants; codes are not plus anything."""
    most, highest = np.zeros(len(x), np.float32), real(top)
    for column in x.T:  # of NaN, the next number
        most = np.where(most > column, most, column)
    best_inverse = highest / most
    level = (near(best_inverse[:, None] * x) & 255).astype(np.float32)
    difference = x - (real(1) / best_inverse)[:, None] * level
    best = total(w * difference * difference)
    for i in (*range(-4, 0), *range(1, 5)):
        inverse = (real(0.1) * real(i) + highest) / most
        level = np.minimum(near(inverse[:, None] * x), top).astype(np.float32)
        difference = x - (real(1) / inverse)[:, None] * level
        error = total(w * difference * difference)
        better = error < best
        best_inverse, best = np.where(better, inverse, best_inverse), np.where(better, error, best)
    held = np.minimum(near(best_inverse[:, None] * x), top)
    level = held.astype(np.float32)
    product, square = total(w * x * level), total(w * level * level)
    codes = held & 255
    for _ in range(5):
        before = codes.copy()
        for i in range(x.shape[1]):
            xi, wi, level = x[:, i], w[:, i], codes[:, i].astype(np.float32)
            a, b = product - wi * xi * level, square - wi * level * level
            tried = np.minimum(near(quotient(xi * b, a)), top)
            other = tried.astype(np.float32)
            new_a, new_b = a + wi * xi * other, b + wi * other * other
            better = (a > 0) & (b > 0) & (tried != codes[:, i])
            better &= new_a * new_a * square > product * product * new_b
            codes[:, i] = np.where(better, tried & 255, codes[:, i])
            product, square = np.where(better, new_a, product), np.where(better, new_b, square)
        if np.array_equal(before, codes):
            break
    tiny = most < TINY
    scale = np.where(square > 0, quotient(product, square), real(0))
    return Ray(np.where(tiny, real(0), scale), np.where(tiny[:, None], 0, codes))
