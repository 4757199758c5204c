"""Largest magnitude and range of groups of raw weights."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import Check, Make
from numpy.typing import NDArray

from shardq.kernels import DTYPES, KernelSet

Extremes = tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32], int, int]


def extremes(kernels: KernelSet, src: NDArray[Any], dtype: str, group: int) -> Extremes:
    most, low, high = np.full((3, src.shape[0], -(-src.shape[1] // group)), 7, np.float32)
    bad = kernels.group_absmax(src, dtype, group, most)
    return most, low, high, bad, kernels.group_range(src, dtype, group, low, high)


@given(
    seed=st.integers(0, 2**32 - 1),
    kind=st.sampled_from(("plain", "edges", "tiny", "wild")),
    dtype=st.sampled_from(DTYPES),
    shape=st.tuples(st.integers(1, 5), st.integers(1, 1200)),
    group=st.sampled_from((1, 2, 5, 8, 16, 24, 31, 32, 64, 100, 120, 128, 256, 5000)),
)
@settings(max_examples=200, deadline=None)
def test_extremes_equal_reference(
    kernels: KernelSet,
    reference: KernelSet,
    make_weights: Make,
    same_bits: Check,
    seed: int,
    kind: str,
    dtype: str,
    shape: tuple[int, int],
    group: int,
) -> None:
    src = make_weights(seed, kind, *shape, dtype)
    found, expected = extremes(kernels, src, dtype, group), extremes(reference, src, dtype, group)
    for i in range(3):
        same_bits(np.asarray(found[i]), np.asarray(expected[i]))
    assert found[3:] == expected[3:]


@pytest.mark.parametrize("group", [16, 32, 128, 7])
@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf])
def test_bad_groups_are_infinite_and_counted(kernels: KernelSet, group: int, value: float) -> None:
    w = np.full((2, 3 * group), -0.25, np.float32)
    w[0, group], w[1, -1] = value, value
    most, low, high, bad, bad_ranges = extremes(kernels, w, "F32", group)
    assert bad == bad_ranges == 2
    assert most.tolist() == [[0.25, np.inf, 0.25], [0.25, 0.25, np.inf]]
    assert low.tolist() == [[-0.25, -np.inf, -0.25], [-0.25, -0.25, -np.inf]]
    assert high.tolist() == [[-0.25, np.inf, -0.25], [-0.25, -0.25, np.inf]]


def test_zeros_are_positive_and_zero_is_not_forced(kernels: KernelSet) -> None:
    w = np.array([[-0.0, -0.0, 0.5, 0.25]], np.float32)
    most, low, high, _, _ = extremes(kernels, w, "F32", 2)
    assert most.tolist() == [[0.0, 0.5]]
    assert low.tolist() == [[0.0, 0.25]]
    assert not np.signbit([most, low, high]).any()
