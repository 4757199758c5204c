"""Searches for scales and zero points or biases: natively as in the reference, and never worse than at first."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import IMPORTANCES, Case, Check, Make, MakeImportance, WithoutNan, draw_cases
from numpy.typing import NDArray

from shardq.kernels import KernelSet
from shardq.kernels.contract import DECODING_RULES, OBJECTIVES, SCALE_FORMATS

Numbers = NDArray[np.float32]

FACTORS = np.linspace(0.4, 1.1, 8).astype(np.float32)


def starts(kernels: KernelSet, src: NDArray[Any], dtype: str, bits: int, group: int, rule: str) -> tuple[Numbers, ...]:
    """Scales and offsets of round-to-nearest."""
    shape = (len(src), -(-src.shape[1] // group))
    scales, zeros, low = np.empty(shape, np.float32), np.empty(shape, np.uint8), np.empty(shape, np.float32)
    codes = np.empty(src.shape, np.uint8)
    kernels.rtn_int(src, dtype, bits, group, False, codes, scales, zeros)
    if rule == "zero":
        return scales, zeros.astype(np.float32)
    kernels.group_range(src, dtype, group, low, np.empty_like(low))
    return scales, np.nan_to_num(low, nan=0.0, posinf=0.0, neginf=0.0)


def run(
    kernels: KernelSet,
    src: NDArray[Any],
    dtype: str,
    bits: int,
    group: int,
    rule: str,
    importance: NDArray[np.float32] | None = None,
    objective: str = "none",
    factors: Numbers = FACTORS,
    sweeps: int = 3,
    scale: str = "fp16",
    least: float = 1e-5,
) -> tuple[Numbers, Numbers, NDArray[np.float64], Numbers, Numbers]:
    """Scales, offsets, losses, and what scales and offsets were."""
    old = starts(kernels, src, dtype, bits, group, rule)
    scales, offsets, losses = old[0].copy(), old[1].copy(), np.full((len(src), 2), -1.0)
    kernels.search_affine(
        src, dtype, bits, group, importance, objective, factors, rule, sweeps, scale, least, scales, offsets, losses
    )
    return scales, offsets, losses, *old


@given(
    case=draw_cases(500, (1, 5, 16, 32, 33, 64, 100, 128, 200, 5000)),
    bits=st.integers(2, 8),
    rule=st.sampled_from(DECODING_RULES),
    weights=st.sampled_from(IMPORTANCES),
    objective=st.sampled_from(OBJECTIVES),
    count=st.integers(1, 8),
    sweeps=st.integers(0, 3),
    scale=st.sampled_from(SCALE_FORMATS),
    least=st.sampled_from((0.0, 1e-5, 1e-2)),
)
@settings(max_examples=120, deadline=None)
def test_search_affine_equals_reference(
    kernels: KernelSet,
    reference: KernelSet,
    make_weights: Make,
    make_importance: MakeImportance,
    same_bits: Check,
    without_nan: WithoutNan,
    case: Case,
    bits: int,
    rule: str,
    weights: str,
    objective: str,
    count: int,
    sweeps: int,
    scale: str,
    least: float,
) -> None:
    src = make_weights(case.seed, case.kind, *case.shape, case.dtype)
    how = (make_importance(case.seed, weights, case.shape[1]), objective, FACTORS[:count], sweeps, scale, least)
    found = run(kernels, src, case.dtype, bits, case.group, rule, *how)
    expected = run(reference, src, case.dtype, bits, case.group, rule, *how)
    for a, b in zip(found, expected, strict=True):
        same_bits(without_nan(a + a.dtype.type(0)), without_nan(b + b.dtype.type(0)))  # -0 is as good as 0


def weighted_errors(
    w: Numbers, scales: Numbers, offsets: Numbers, bits: int, group: int, rule: str, e: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Of each group [rows, G], in double, with codes of true divisions."""
    steps, places = (np.repeat(x, group, 1)[:, : w.shape[1]] for x in (scales, offsets))
    top = (1 << bits) - 1
    if rule == "zero":
        decoded = steps * (np.clip(np.rint(w / steps) + places, 0, top) - places).astype(np.float64)
    else:
        decoded = steps * np.clip(np.rint((w - places) / steps), 0, top).astype(np.float64) + places
    return np.add.reduceat(e * (w - decoded) ** 2, np.arange(0, w.shape[1], group), axis=1)


@pytest.mark.parametrize("rule", DECODING_RULES)
@pytest.mark.parametrize(("bits", "group"), [(2, 32), (2, 128), (3, 128), (4, 32), (4, 128), (8, 600)])
def test_no_group_is_worse_than_it_was(
    kernels: KernelSet, make_weights: Make, make_importance: MakeImportance, bits: int, group: int, rule: str
) -> None:
    w = make_weights(bits, "plain", 37, 600, "F32")
    w[:, 3] *= 20
    importance = make_importance(bits, "plain", 600)
    assert importance is not None
    scales, offsets, losses, *old = run(kernels, w, "F32", bits, group, rule, importance)
    e = np.broadcast_to(importance, w.shape).astype(np.float64)
    before = weighted_errors(w, *old, bits, group, rule, e)
    after = weighted_errors(w, scales, offsets, bits, group, rule, e)
    assert (after <= before * (1 + 1e-5)).all()
    assert after.sum() < before.sum()
    np.testing.assert_allclose(losses, np.stack((before.sum(1), after.sum(1)), 1), rtol=1e-4)
    assert np.array_equal(scales, scales.astype(np.float16))
    assert np.array_equal(offsets, np.clip(np.rint(offsets), 0, 2**bits - 1) if rule == "zero" else offsets)


@pytest.mark.parametrize("rule", DECODING_RULES)
def test_a_group_alone_is_what_it_is_among_others(
    kernels: KernelSet, make_weights: Make, same_bits: Check, rule: str
) -> None:
    src = make_weights(4, "plain", 21, 330, "BF16")
    importance = np.linspace(0.1, 3, 330, dtype=np.float32)
    scales, offsets, *_ = run(kernels, src, "BF16", 4, 100, rule, importance, "root")
    for row in (0, 7, 16, 20):
        for k, at in enumerate(range(0, 330, 100)):
            part = np.ascontiguousarray(src[row : row + 1, at : at + 100])
            found = run(kernels, part, "BF16", 4, 100, rule, importance[at : at + 100].copy(), "root")
            same_bits(found[0], scales[row : row + 1, k : k + 1].copy())
            same_bits(found[1], offsets[row : row + 1, k : k + 1].copy())


@pytest.mark.parametrize("rule", DECODING_RULES)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_groups_that_hold_no_number_or_equal_ones_stay(kernels: KernelSet, value: float, rule: str) -> None:
    w = np.random.default_rng(0).standard_normal((3, 128)).astype(np.float32)
    w[0, :64], w[1, 64 + 5] = 0, value
    with np.errstate(all="ignore"):
        scales, offsets, losses, *old = run(kernels, w, "F32", 3, 64, rule)
    for row, k in ((0, 0), (1, 1)):
        assert scales[row, k] == old[0][row, k]
        assert offsets[row, k] == old[1][row, k]
    assert (scales != old[0]).sum() > 2
    assert not np.isfinite(losses[1]).any()


def test_biases_fit_a_line_exactly_where_the_weights_are_one(kernels: KernelSet) -> None:
    codes = np.random.default_rng(1).integers(0, 16, (4, 64))
    w = (codes * 0.125 - 0.75).astype(np.float32)
    scales, offsets, losses, *_ = run(kernels, w, "F32", 4, 64, "bias")
    assert np.array_equal(scales, np.full((4, 1), 0.125, np.float32))
    assert np.array_equal(offsets, np.full((4, 1), -0.75, np.float32))
    assert not losses[:, 1].any()
