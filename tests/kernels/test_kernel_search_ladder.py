"""Searches among the scales of an 8-bit format: natively as in the reference, and as trying them all one by one."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import (
    FLOATS,
    IMPORTANCES,
    Bytes,
    Case,
    Check,
    Floats,
    Make,
    MakeImportance,
    WithoutNan,
    draw_cases,
    draw_rungs,
    make_ladder,
)
from numpy.typing import NDArray

from shardq.kernels import KernelSet
from shardq.kernels.contract import OBJECTIVES

LARGEST = {"e0m3": 1.75, "e2m1": 6.0, "e2m3": 7.5, "e3m2": 28.0, "e4m3fn": 448.0, "e5m2": 57344.0}


def run(
    kernels: KernelSet,
    src: NDArray[Any],
    dtype: str,
    element: str,
    group: int,
    ladder: Floats,
    codes: tuple[Bytes, Bytes, Bytes],
    importance: Floats | None = None,
    objective: str = "none",
) -> tuple[Bytes, NDArray[np.float64]]:
    first, last, chosen = codes[0], codes[1], codes[2].copy()
    losses = np.full((len(src), 2), -1.0)
    kernels.search_ladder(src, dtype, element, group, importance, objective, ladder, first, last, chosen, losses)
    return chosen, losses


@given(
    case=draw_cases(400, (1, 5, 16, 32, 33, 64, 100, 128, 200, 5000)),
    element=st.sampled_from(FLOATS),
    rungs=st.sampled_from(("powers", "e4m3", "wild")),
    weights=st.sampled_from(IMPORTANCES),
    objective=st.sampled_from(OBJECTIVES),
    most=st.integers(0, 15),
)
@settings(max_examples=120, deadline=None)
def test_search_ladder_equals_reference(
    kernels: KernelSet,
    reference: KernelSet,
    make_weights: Make,
    make_importance: MakeImportance,
    same_bits: Check,
    without_nan: WithoutNan,
    case: Case,
    element: str,
    rungs: str,
    weights: str,
    objective: str,
    most: int,
) -> None:
    src = make_weights(case.seed, case.kind, *case.shape, case.dtype)
    importance = make_importance(case.seed, weights, case.shape[1])
    how = make_ladder(kernels, rungs), draw_rungs(case, 90, 130, most), importance, objective
    with np.errstate(all="ignore"):
        found, losses = run(kernels, src, case.dtype, element, case.group, *how)
        expected, expected_losses = run(reference, src, case.dtype, element, case.group, *how)
    same_bits(found, expected)
    same_bits(without_nan(losses), without_nan(expected_losses))


@pytest.mark.parametrize(("element", "group", "rungs"), [
    ("e2m1", 16, "e4m3"), ("e2m1", 32, "powers"), ("e4m3fn", 32, "powers"), ("e2m3", 32, "powers"),
])  # fmt: skip
def test_the_best_of_all_codes_is_chosen(
    kernels: KernelSet, make_weights: Make, make_importance: MakeImportance, element: str, group: int, rungs: str
) -> None:
    """By the encoder and decoder, in double."""
    w, importance = make_weights(1, "plain", 21, 10 * group, "F32"), make_importance(1, "plain", 10 * group)
    assert importance is not None
    ladder = make_ladder(kernels, rungs)
    most = np.abs(w.reshape(21, 10, group)).max(2) / np.float32(LARGEST[element])
    chosen = np.searchsorted(ladder[:127], most).astype(np.uint8)
    first, last = chosen - np.uint8(6), np.minimum(chosen + np.uint8(4), 126)
    errors = []
    for i in range(11):
        steps = ladder[np.minimum(first + i, last)]
        codes, values = np.empty(w.shape, np.uint8), np.empty_like(w)
        kernels.encode_scaled(w, "F32", element, group, steps, codes)
        kernels.decode_scaled(codes, element, steps, group, values)
        squares = importance * (w - values).astype(np.float64) ** 2
        errors.append(squares.reshape(21, 10, group).sum(2))
    least = np.min(errors, axis=0)
    best, losses = run(kernels, w, "F32", element, group, ladder, (first, last, chosen), importance)
    reached = np.take_along_axis(np.array(errors), (best.astype(int) - first)[None], axis=0)[0]
    assert (reached <= least * (1 + 1e-5)).all()
    np.testing.assert_allclose(losses[:, 1], reached.sum(1), rtol=1e-5)
    assert (losses[:, 1] <= losses[:, 0]).all()
    assert element != "e2m1" or (best != chosen).sum() > 20


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 0.0])
def test_groups_that_hold_no_number_or_only_zeros_stay(kernels: KernelSet, value: float) -> None:
    w = np.random.default_rng(0).standard_normal((2, 64)).astype(np.float32)
    w[1, 32:] = value
    chosen = np.full((2, 2), 125, np.uint8)
    ladder = make_ladder(kernels, "powers")
    with np.errstate(all="ignore"):
        best, _ = run(kernels, w, "F32", "e2m1", 32, ladder, (chosen - np.uint8(1), chosen + np.uint8(1), chosen))
    assert best[1, 1] == 125


def test_no_code_to_try_leaves_the_old_one(kernels: KernelSet, make_weights: Make) -> None:
    src = make_weights(2, "plain", 5, 96, "BF16")
    chosen, ladder = np.full((5, 3), 60, np.uint8), make_ladder(kernels, "powers")
    first, last = chosen + np.uint8(60), chosen.copy()
    last[:, 1] = 125
    best, _ = run(kernels, src, "BF16", "e2m1", 32, ladder, (first, last, chosen))
    assert (best[:, [0, 2]] == 60).all()
    assert (best[:, 1] > 60).all()
