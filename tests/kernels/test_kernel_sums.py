"""Columns of fp16, and sums that do not depend on the order of rows."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import Check

from shardq.kernels import KernelSet
from shardq.kernels.contract import FIGURES

DOUBLES = st.floats(0.0, 1e300, allow_subnormal=True)
SIGNED = st.floats(-1e300, 1e300, allow_subnormal=True)
COUNTS = st.integers(0, 2**40).map(float)


@given(
    seed=st.integers(0, 2**32 - 1),
    shape=st.tuples(st.integers(1, 40), st.integers(1, 20)),
    before=st.integers(0, 3),
    after=st.integers(0, 3),
)
@settings(max_examples=100, deadline=None)
def test_narrow_columns_equals_reference_and_numpy(
    kernels: KernelSet,
    reference: KernelSet,
    same_bits: Check,
    seed: int,
    shape: tuple[int, int],
    before: int,
    after: int,
) -> None:
    rng = np.random.default_rng(seed)
    src = rng.integers(0, 2**32, shape, np.uint32)
    src[rng.random(shape) < 0.7] &= 0x8FFFFFFF
    src[rng.random(shape) < 0.9] |= 0x30000000  # most of them in the range of fp16 or near it
    values = src.view(np.float32)
    start = rng.integers(0, 2**16, (shape[1], before + shape[0] + after), np.uint16)
    expected = start.copy()
    with np.errstate(over="ignore", invalid="ignore"):
        halves = values.T.astype(np.float16)
    patterns = np.where(np.isnan(halves), np.where(np.signbit(halves), 0xFE00, 0x7E00), halves.view(np.uint16))
    expected[:, before : before + shape[0]] = patterns
    for each in (kernels, reference):
        found = start.copy()
        each.narrow_columns(values, found, before)
        same_bits(found, expected)


def test_every_fp16_number_and_every_midpoint_is_rounded_half_to_even(kernels: KernelSet, same_bits: Check) -> None:
    halves = np.arange(0x7C00, dtype=np.uint16)
    exact = halves.view(np.float16).astype(np.float32)
    middles = (exact[:-1] + exact[1:]) / 2  # exact in fp32
    edges = np.array([65519.996, 65520.0, 3e38, np.inf], np.float32)
    for values in (exact, middles, np.nextafter(middles, 0), np.nextafter(middles, np.float32(1e9)), edges, -middles):
        found = np.empty((1, len(values)), np.uint16)
        kernels.narrow_columns(values.reshape(-1, 1), found, 0)
        with np.errstate(over="ignore"):
            same_bits(found[0], values.astype(np.float16).view(np.uint16))


@given(rows=st.lists(st.tuples(DOUBLES, DOUBLES, DOUBLES, SIGNED, COUNTS, COUNTS), min_size=1, max_size=60))
@settings(max_examples=200, deadline=None)
def test_sums_are_those_of_fsum(kernels: KernelSet, rows: list[tuple[float, ...]]) -> None:
    stats = np.array(rows, np.float64)
    sums = [math.fsum(r[i] for r in rows) for i in range(FIGURES)]
    expected = (*sums[:2], max(r[2] for r in rows), *sums[3:])
    assert kernels.sum_errors(stats) == expected
    assert kernels.sum_errors(stats[::-1].copy()) == expected


@pytest.mark.parametrize("seed", range(20))
def test_sums_of_many_magnitudes_are_exact(kernels: KernelSet, reference: KernelSet, seed: int) -> None:
    rng = np.random.default_rng(seed)
    stats = rng.random((500, FIGURES)) * 2.0 ** rng.integers(-1000, 900, (500, FIGURES)).astype(np.float64)
    stats[::7] = 2.0 ** rng.integers(-60, 60, stats[::7].shape).astype(np.float64)
    stats[:, 3] *= rng.choice([-1.0, 1.0], 500)
    stats[:, 4:] = rng.integers(0, 2**40, (500, 2))
    assert kernels.sum_errors(stats) == reference.sum_errors(stats)


def test_halves_of_a_unit_are_rounded_by_what_lies_below(kernels: KernelSet) -> None:
    for smallest, expected in ((0.0, 1.0), (2.0**-200, 1.0 + 2.0**-52)):
        stats = np.zeros((3, FIGURES))
        stats[:, 0] = 1.0, 2.0**-53, smallest
        assert kernels.sum_errors(stats) == (expected, 0.0, 0.0, 0.0, 0.0, 0.0)


def test_a_sum_beyond_double_is_infinite(kernels: KernelSet) -> None:
    stats = np.full((5000, FIGURES), 1.7e308)
    stats[:, 1] = np.resize([1.0, 1.7e308, 2.0**-1074], 5000)
    stats[:, 3] *= -1
    stats[:, 4:] = 1
    assert kernels.sum_errors(stats) == (math.inf, math.inf, 1.7e308, -math.inf, 5000, 5000)


def test_what_is_not_finite_stays_so(kernels: KernelSet) -> None:
    stats = np.ones((3, FIGURES))
    stats[:, :4] = [[1.0, np.inf, 1.0, np.nan], [np.nan, 1.0, np.nan, 1.0], [1.0, 1.0, 2.0, 1.0]]
    squares, weights, largest, products, ends, zeroed = kernels.sum_errors(stats)
    assert math.isnan(squares)
    assert weights == math.inf
    assert math.isnan(largest)
    assert math.isnan(products)
    assert (ends, zeroed) == (3, 3)
