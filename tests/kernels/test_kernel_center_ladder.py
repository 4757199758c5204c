"""Scales of an 8-bit format that move for a smaller mean error: natively as in the reference, and never a larger."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import (
    FLOATS,
    IMPORTANCES,
    SPREADS,
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


def center(
    kernels: KernelSet, src: NDArray[Any], dtype: str, element: str, group: int, importance: Floats | None,
    spread: Floats, means: Floats, ladder: Floats, codes: tuple[Bytes, Bytes, Bytes],
) -> tuple[Bytes, NDArray[np.float64]]:  # fmt: skip
    """Codes, and losses of which the first are 3 and the second 5. `codes`: first, last, chosen."""
    out, losses = np.full_like(codes[2], 7), np.tile([3.0, 5.0], (len(src), 1))
    kernels.center_ladder(src, dtype, element, group, importance, spread, means, ladder, *codes, out, losses)
    return out, losses


def make_means(seed: int, cols: int, size: float = 1.0) -> Floats:
    return (np.random.default_rng(seed).standard_normal(cols) * size).astype(np.float32)


def nearest_codes(w: Floats, ladder: Floats, group: int) -> Bytes:
    """The smallest scales under which nothing of e2m1 saturates."""
    most = np.abs(w.reshape(len(w), -1, group)).max(2) / np.float32(6)
    return np.searchsorted(ladder[:127], most).clip(max=126).astype(np.uint8)


def find_errors(kernels: KernelSet, w: Floats, codes: Bytes, ladder: Floats, group: int) -> NDArray[np.float64]:
    """Of each weight, by encoder and decoder."""
    steps, small, values = ladder[codes], np.empty(w.shape, np.uint8), np.empty_like(w)
    kernels.encode_scaled(w, "F32", "e2m1", group, steps, small)
    kernels.decode_scaled(small, "e2m1", steps, group, values)
    return values.astype(np.float64) - w


@given(
    case=draw_cases(300, (5, 16, 32, 33, 64, 128, 200, 5000)),
    element=st.sampled_from(FLOATS),
    rungs=st.sampled_from(("e4m3", "wild")),
    weights=st.sampled_from(IMPORTANCES),
    spreads=st.sampled_from(SPREADS),
    size=st.sampled_from((0.0, 1e-3, 1.0, 1e20)),
    most=st.integers(0, 9),
)
@settings(max_examples=80, deadline=None)
def test_center_ladder_equals_reference(
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
    spreads: str,
    size: float,
    most: int,
) -> None:
    seed, cols = case.seed, case.shape[1]
    src, importance = make_weights(seed, case.kind, *case.shape, case.dtype), make_importance(seed, weights, cols)
    spread = make_importance(seed + 1, spreads, cols)
    assert spread is not None
    ladder, codes = make_ladder(kernels, rungs), draw_rungs(case, 60, 120, most)
    how = importance, spread, make_means(seed, cols, size), ladder, codes
    with np.errstate(all="ignore"):
        found, losses = center(kernels, src, case.dtype, element, case.group, *how)
        expected, expected_losses = center(reference, src, case.dtype, element, case.group, *how)
    same_bits(found, expected)
    same_bits(without_nan(losses), without_nan(expected_losses))


@pytest.mark.parametrize("group", [16, 32, 160])
def test_rows_err_less_and_by_the_best_code_of_the_last_group(
    kernels: KernelSet, make_weights: Make, make_importance: MakeImportance, group: int
) -> None:
    w, ladder, means = make_weights(3, "plain", 37, 320, "F32"), make_ladder(kernels, "e4m3"), make_means(3, 320)
    spread = make_importance(3, "plain", 320)
    assert spread is not None
    chosen = nearest_codes(w, ladder, group)
    codes = chosen - np.uint8(3), np.minimum(chosen + np.uint8(3), 126), chosen
    found, losses = center(kernels, w, "F32", "e2m1", group, None, spread, means, ladder, codes)

    def errors_of(codes: Bytes) -> NDArray[np.float64]:
        e = find_errors(kernels, w, codes, ladder, group)
        sums: NDArray[np.float64] = (spread * e**2).sum(1) + (e @ means.astype(np.float64)) ** 2
        return sums

    before, after = errors_of(chosen), errors_of(found)
    moved = (found != chosen).any(1)
    assert moved.sum() > 30
    assert (after[moved] < before[moved]).all()
    assert (after[~moved] == before[~moved]).all()
    assert ((found >= codes[0]) & (found <= codes[1])).all()
    for step in range(-3, 4):  # no group follows the last, so that its code is the best of all
        other = found.copy()
        other[:, -1] = np.minimum(chosen[:, -1].astype(int) + step, 126)
        assert (errors_of(other)[moved] >= after[moved] * (1 - 1e-5)).all()
    e = find_errors(kernels, w, found, ladder, group)
    assert np.allclose(losses[moved, 1], (e**2).sum(1)[moved], rtol=1e-4)
    assert (losses[~moved, 1] == 5).all()
    assert (losses[:, 0] == 3).all()


def test_rows_without_numbers_and_groups_without_choice_stay(kernels: KernelSet, make_weights: Make) -> None:
    w, ladder = make_weights(4, "plain", 4, 128, "F32"), make_ladder(kernels, "e4m3")
    chosen = nearest_codes(w, ladder, 32)
    w[0], w[1, 70], w[2, 100] = 0, np.nan, np.inf
    last = chosen + np.uint8(2)
    last[3, 1] = chosen[3, 1] - 3  # below the first
    with np.errstate(all="ignore"):
        found, losses = center(
            kernels, w, "F32", "e2m1", 32, None, np.ones(128, np.float32), make_means(4, 128) * 10, ladder,
            (chosen - np.uint8(2), last, chosen),
        )  # fmt: skip
    assert np.array_equal(found[:3], chosen[:3])
    assert (losses[:3, 1] == 5).all()
    assert found[3, 1] == chosen[3, 1]
    assert (found[3] != chosen[3]).any()


@pytest.mark.parametrize(("which", "wrong"), [("spread", -1.0), ("means", np.nan), ("ladder", np.inf), ("element", "")])
def test_wrong_arguments_are_refused(kernels: KernelSet, reference: KernelSet, which: str, wrong: float | str) -> None:
    named = {
        "spread": np.ones(32, np.float32), "means": np.ones(32, np.float32), "ladder": np.ones(256, np.float32),
    }  # fmt: skip
    if which != "element":
        named[which][7] = wrong
    codes = np.full((2, 2), 9, np.uint8)
    element = "e2m1" if which != "element" else "int4"
    for each in (kernels, reference):
        with pytest.raises(ValueError, match=f"^{which}: expected"):
            center(each, np.ones((2, 32), np.float32), "F32", element, 16, None, *named.values(), (codes,) * 3)
