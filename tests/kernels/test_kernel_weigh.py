"""What weights count where errors are weighed."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import Check, Make, MakeImportance, WithoutNan
from numpy.typing import NDArray

from shardq.kernels import DTYPES, KernelSet
from shardq.kernels.contract import OBJECTIVES


def weighed(
    kernels: KernelSet, src: NDArray[Any], dtype: str, group: int, importance: NDArray[np.float32] | None, how: str
) -> NDArray[np.float64]:
    out = np.full(len(src), -1.0)
    kernels.weigh_squares(src, dtype, group, importance, how, out)
    return out


@given(
    seed=st.integers(0, 2**32 - 1),
    kind=st.sampled_from(("plain", "edges", "tiny", "wild")),
    dtype=st.sampled_from(DTYPES),
    shape=st.tuples(st.integers(1, 20), st.integers(1, 700)),
    group=st.sampled_from((1, 7, 16, 32, 64, 100, 128, 130, 300, 2000)),
    worth=st.sampled_from(("none", "equal", "plain", "zeros", "all_zero", "huge")),
    objective=st.sampled_from(OBJECTIVES),
)
@settings(max_examples=120, deadline=None)
def test_weighed_squares_equal_reference(
    kernels: KernelSet,
    reference: KernelSet,
    make_weights: Make,
    make_importance: MakeImportance,
    same_bits: Check,
    without_nan: WithoutNan,
    seed: int,
    kind: str,
    dtype: str,
    shape: tuple[int, int],
    group: int,
    worth: str,
    objective: str,
) -> None:
    src, importance = make_weights(seed, kind, *shape, dtype), make_importance(seed, worth, shape[1])
    with np.errstate(all="ignore"):
        found, wanted = (weighed(k, src, dtype, group, importance, objective) for k in (kernels, reference))
    same_bits(without_nan(found), without_nan(wanted))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_weighed_squares_are_near_float64(kernels: KernelSet, make_weights: Make, objective: str) -> None:
    w = make_weights(2, "plain", 5, 320, "F32")
    importance = (np.arange(320) % 7).astype(np.float32)
    wide = w.astype(np.float64).reshape(5, 5, 64)
    squares = wide**2
    counts = {"none": 1.0, "square": squares, "root": np.sqrt(squares.mean(2, keepdims=True) + squares)}[objective]
    expected = (importance.reshape(5, 64) * counts * squares).sum((1, 2))
    np.testing.assert_allclose(weighed(kernels, w, "F32", 64, importance, objective), expected, rtol=1e-5)
