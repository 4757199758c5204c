"""Searches for scales of symmetric integers: natively as in the reference, and never worse than at first."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import IMPORTANCES, Case, Check, Make, MakeImportance, WithoutNan, draw_cases
from numpy.typing import NDArray

from shardq.kernels import KernelSet
from shardq.kernels.contract import OBJECTIVES, SCALE_FORMATS, SIGNS

FACTORS = np.geomspace(0.6, 2.0, 9).astype(np.float32)
FACTORS[4] = 1


def run(
    kernels: KernelSet,
    src: NDArray[Any],
    dtype: str,
    bits: int,
    group: int,
    importance: NDArray[np.float32] | None = None,
    objective: str = "none",
    factors: NDArray[np.float32] = FACTORS,
    signs: str = "range",
    sweeps: int = 2,
    scale: str = "fp16",
    least: float = 1e-5,
) -> tuple[NDArray[np.float32], NDArray[np.float64], NDArray[np.float32]]:
    """Scales, losses, and the scales of round-to-nearest."""
    shape = (len(src), -(-src.shape[1] // group))
    old, codes, zeros = np.empty(shape, np.float32), np.empty(src.shape, np.uint8), np.empty(shape, np.uint8)
    kernels.rtn_int(src, dtype, bits, group, True, codes, old, zeros)
    scales, losses = old.copy(), np.full((len(src), 2), -1.0)
    kernels.search_int(
        src, dtype, bits, group, importance, objective, factors, signs, sweeps, scale, least, scales, losses
    )
    return scales, losses, old


@given(
    case=draw_cases(500, (1, 5, 16, 32, 33, 64, 100, 128, 200, 5000)),
    bits=st.integers(2, 8),
    weights=st.sampled_from(IMPORTANCES),
    objective=st.sampled_from(OBJECTIVES),
    signs=st.sampled_from(SIGNS),
    count=st.integers(1, 9),
    sweeps=st.integers(0, 3),
    scale=st.sampled_from(SCALE_FORMATS),
    least=st.sampled_from((0.0, 1e-5, 1e-2)),
)
@settings(max_examples=120, deadline=None)
def test_search_int_equals_reference(
    kernels: KernelSet,
    reference: KernelSet,
    make_weights: Make,
    make_importance: MakeImportance,
    same_bits: Check,
    without_nan: WithoutNan,
    case: Case,
    bits: int,
    weights: str,
    objective: str,
    signs: str,
    count: int,
    sweeps: int,
    scale: str,
    least: float,
) -> None:
    src = make_weights(case.seed, case.kind, *case.shape, case.dtype)
    how = (make_importance(case.seed, weights, case.shape[1]), objective, FACTORS[:count], signs, sweeps, scale, least)
    found, losses, _ = run(kernels, src, case.dtype, bits, case.group, *how)
    expected, expected_losses, _ = run(reference, src, case.dtype, bits, case.group, *how)
    same_bits(found, expected)
    same_bits(without_nan(losses), without_nan(expected_losses))


def weighted_errors(
    w: NDArray[np.float32], scales: NDArray[np.float32], bits: int, group: int, e: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Of each group [rows, G], in double, with codes of true divisions."""
    half, steps = 1 << (bits - 1), np.repeat(scales, group, 1)[:, : w.shape[1]]
    errors = e * (w - steps * np.clip(np.rint(w / steps), -half, half - 1).astype(np.float64)) ** 2
    return np.add.reduceat(errors, np.arange(0, w.shape[1], group), axis=1)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("signs", SIGNS)
@pytest.mark.parametrize(("bits", "group"), [(2, 32), (2, 128), (3, 128), (4, 32), (4, 128), (8, 600)])
def test_no_group_is_worse_than_rounding_to_nearest(
    kernels: KernelSet, make_weights: Make, make_importance: MakeImportance, bits: int, group: int, signs: str,
    objective: str,
) -> None:  # fmt: skip
    w = make_weights(bits, "plain", 37, 600, "F32")
    w[:, 3] *= 20
    importance = make_importance(bits, "plain", 600)
    assert importance is not None
    scales, losses, old = run(kernels, w, "F32", bits, group, importance, objective, signs=signs)
    wide, starts = w.astype(np.float64), np.arange(0, 600, group)
    mean = np.add.reduceat(wide**2, starts, axis=1) / np.diff([*starts, 600])
    e = importance * {
        "none": np.ones_like(wide),
        "square": wide**2,
        "root": np.sqrt(np.repeat(mean, group, 1)[:, :600] + wide**2),
    }[objective]  # fmt: skip
    before, after = (weighted_errors(w, s, bits, group, e) for s in (old, scales))
    assert (after <= before * (1 + 1e-5)).all()
    assert after.sum() < before.sum()
    np.testing.assert_allclose(losses, np.stack((before.sum(1), after.sum(1)), 1), rtol=1e-5)
    assert np.array_equal(scales, scales.astype(np.float16))


def test_equal_importance_is_no_importance(kernels: KernelSet, make_weights: Make, same_bits: Check) -> None:
    src = make_weights(3, "plain", 20, 320, "BF16")
    plain = run(kernels, src, "BF16", 3, 64)
    ones = run(kernels, src, "BF16", 3, 64, np.ones(320, np.float32))
    for a, b in zip(plain, ones, strict=True):
        same_bits(a, b)
    fours = run(kernels, src, "BF16", 3, 64, np.full(320, 4, np.float32))
    same_bits(plain[0], fours[0])
    same_bits(plain[1] * 4, fours[1])


def test_a_group_alone_is_what_it_is_among_others(kernels: KernelSet, make_weights: Make, same_bits: Check) -> None:
    """Rows share registers, groups share a buffer."""
    src = make_weights(4, "plain", 21, 330, "BF16")
    importance = np.linspace(0.1, 3, 330, dtype=np.float32)
    scales, _, _ = run(kernels, src, "BF16", 4, 100, importance, "root")
    for row in (0, 7, 16, 20):
        for k, at in enumerate(range(0, 330, 100)):
            part = np.ascontiguousarray(src[row : row + 1, at : at + 100])
            alone, _, _ = run(kernels, part, "BF16", 4, 100, importance[at : at + 100].copy(), "root")
            same_bits(alone, scales[row : row + 1, k : k + 1].copy())


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("group", [32, 200])
def test_groups_that_hold_no_number_or_only_zeros_stay(kernels: KernelSet, value: float, group: int) -> None:
    w = np.random.default_rng(0).standard_normal((3, 2 * group)).astype(np.float32)
    w[0, :group], w[1, group + 5] = 0, value
    with np.errstate(all="ignore"):
        scales, losses, old = run(kernels, w, "F32", 3, group)
    assert scales[0, 0] == old[0, 0]
    assert scales[1, 1] == old[1, 1]
    assert (scales != old).sum() == 4
    assert not np.isfinite(losses[1]).any()
    assert np.isfinite(losses[[0, 2]]).all()


def test_importance_of_nothing_leaves_the_scales(kernels: KernelSet, make_weights: Make, same_bits: Check) -> None:
    src = make_weights(5, "plain", 4, 256, "F16")
    scales, losses, old = run(kernels, src, "F16", 2, 64, np.zeros(256, np.float32))
    same_bits(scales, old)
    assert not losses.any()


def test_the_second_sign_helps_and_positive_ones_are_positive(kernels: KernelSet, make_weights: Make) -> None:
    src = make_weights(6, "plain", 64, 512, "BF16")
    one, both = (run(kernels, src, "BF16", 2, 64, signs=s)[1][:, 1].sum() for s in ("range", "both"))
    assert both < one
    shape = (64, 8)
    scales, losses = np.full(shape, 1.0, np.float32), np.empty((64, 2))
    kernels.search_int(src, "BF16", 2, 64, None, "none", FACTORS, "positive", 2, "fp16", 1e-5, scales, losses)
    assert (scales > 0).all()
    assert (scales < 1).all()
