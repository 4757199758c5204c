"""Scales or biases that move for a smaller mean error: natively as in the reference, and never for a larger one."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from shardq.kernels import DTYPES, KernelSet
from shardq.kernels.contract import SCALE_FORMATS

Check = Callable[[NDArray[Any], NDArray[Any]], None]
Make = Callable[[int, str, int, int, str], NDArray[Any]]
MakeImportance = Callable[[int, str, int], NDArray[np.float32] | None]
Floats = NDArray[np.float32]
Losses = NDArray[np.float64]

KINDS = ("plain", "edges", "ties", "tiny", "wild")
SPREADS = ("equal", "plain", "zeros", "all_zero", "huge")
MOVES = ("symmetric", "zero", "bias")  # what numbers move: scales, scales under zero points, or biases


def center(
    kernels: KernelSet, src: NDArray[Any], dtype: str, bits: int, group: int, importance: Floats | None, spread: Floats,
    means: Floats, scale: str = "fp16", least: float = 1e-5, kind: str = "symmetric",
) -> tuple[Floats, Losses, Floats, Floats]:  # fmt: skip
    """What moved, losses of which the first are 3 and the second 5, and scales and offsets of round-to-nearest."""
    shape = (len(src), -(-src.shape[1] // group))
    scales, codes, zeros = np.empty(shape, np.float32), np.empty(src.shape, np.uint8), np.empty(shape, np.uint8)
    kernels.rtn_int(src, dtype, bits, group, kind == "symmetric", codes, scales, zeros)
    offsets, rule = zeros.astype(np.float32), "bias" if kind == "bias" else "zero"
    if kind == "bias":
        low = np.empty(shape, np.float32)
        kernels.group_range(src, dtype, group, low, np.empty_like(low))
        offsets = np.nan_to_num(low, nan=0.0, posinf=0.0, neginf=0.0)
    found, losses = np.full_like(scales, 7), np.tile([3.0, 5.0], (len(src), 1))
    kernels.center_groups(
        src, dtype, bits, group, importance, spread, means, rule, scale, least, scales, offsets, found, losses
    )
    return found, losses, scales, offsets


def make_means(seed: int, cols: int, size: float = 1.0) -> Floats:
    return (np.random.default_rng(seed).standard_normal(cols) * size).astype(np.float32)


def find_errors(
    w: NDArray[np.float64], old: tuple[Floats, Floats], new: Floats, bits: int, group: int, kind: str
) -> NDArray[np.float64]:
    """Of each weight, in double, with the codes of the old numbers, scales and offsets."""
    top, cols = (1 << bits) - 1, w.shape[1]
    scale, offset, moved = (np.repeat(x, group, 1)[:, :cols].astype(np.float64) for x in (*old, new))
    if kind == "bias":
        return scale * np.clip(np.rint((w - offset) / scale), 0, top) + moved - w
    return moved * np.clip(np.rint(w / scale), -offset, top - offset) - w


def expected_errors(e: NDArray[np.float64], spread: Floats, means: Floats) -> NDArray[np.float64]:
    """Of each row: sum v * e^2 + (sum m * e)^2."""
    found: NDArray[np.float64] = (spread * e**2).sum(1) + (e @ means.astype(np.float64)) ** 2
    return found


@given(
    seed=st.integers(0, 2**32 - 1),
    kind=st.sampled_from(KINDS),
    shape=st.tuples(st.integers(1, 19), st.integers(1, 500)),
    dtype=st.sampled_from(DTYPES),
    bits=st.integers(2, 8),
    group=st.sampled_from((1, 5, 16, 32, 33, 64, 100, 128, 200, 5000)),
    weights=st.sampled_from(("none", *SPREADS)),
    spreads=st.sampled_from(SPREADS),
    size=st.sampled_from((0.0, 1e-3, 1.0, 1e20)),
    scale=st.sampled_from(SCALE_FORMATS),
    least=st.sampled_from((0.0, 1e-5, 1e-2)),
    which=st.sampled_from(MOVES),
)
@settings(max_examples=200, deadline=None)
def test_center_groups_equals_reference(
    kernels: KernelSet,
    reference: KernelSet,
    make_weights: Make,
    make_importance: MakeImportance,
    same_bits: Check,
    without_nan: Callable[[NDArray[Any]], NDArray[Any]],
    seed: int,
    kind: str,
    shape: tuple[int, int],
    dtype: str,
    bits: int,
    group: int,
    weights: str,
    spreads: str,
    size: float,
    scale: str,
    least: float,
    which: str,
) -> None:
    src = make_weights(seed, kind, *shape, dtype)
    spread = make_importance(seed + 1, spreads, shape[1])
    assert spread is not None
    how = make_importance(seed, weights, shape[1]), spread, make_means(seed, shape[1], size), scale, least, which
    found, losses, *_ = center(kernels, src, dtype, bits, group, *how)
    expected, expected_losses, *_ = center(reference, src, dtype, bits, group, *how)
    same_bits(found, expected)
    same_bits(without_nan(losses), without_nan(expected_losses))


@pytest.mark.parametrize("kind", MOVES)
@pytest.mark.parametrize(("bits", "group"), [(2, 32), (2, 64), (3, 128), (4, 32), (4, 128), (8, 600)])
def test_rows_err_less_and_by_the_best_numbers(
    kernels: KernelSet, make_weights: Make, make_importance: MakeImportance, bits: int, group: int, kind: str
) -> None:
    w = make_weights(bits, "plain", 37, 600, "F32")
    spread, means = make_importance(bits, "plain", 600), make_means(bits, 600)
    assert spread is not None
    found, losses, *old = center(kernels, w, "F32", bits, group, None, spread, means, "fp32", kind=kind)
    numbers = old[1 if kind == "bias" else 0]

    def errors_of(x: Floats) -> NDArray[np.float64]:
        return find_errors(w.astype(np.float64), (old[0], old[1]), x, bits, group, kind)

    before, after = (expected_errors(errors_of(x), spread, means) for x in (numbers, found))
    moved = (found != numbers).any(1)
    assert moved.all()
    assert (after < before).all()
    for nudge in (0.999, 1.001):  # no number of a row can be better alone
        for k in range(found.shape[1]):
            other = found.copy()
            other[:, k] *= np.float32(nudge)
            assert (expected_errors(errors_of(other), spread, means) >= after * (1 - 1e-5)).all()
    assert np.allclose(losses[:, 1], (errors_of(found) ** 2).sum(1), rtol=1e-4)
    assert (losses[:, 0] == 3).all()


def test_without_means_scales_only_fit_the_spread(kernels: KernelSet, make_weights: Make) -> None:
    w, group = make_weights(5, "plain", 20, 300, "F32"), 128
    ones = np.ones(300, np.float32)
    found, _, old, _ = center(kernels, w, "F32", 3, group, None, ones, np.zeros(300, np.float32), "fp32")
    q = np.clip(np.rint(w / np.repeat(old, group, 1)[:, :300]), -4, 3).astype(np.float64)
    starts = np.arange(0, 300, group)
    fit = np.add.reduceat(q * w, starts, axis=1) / np.add.reduceat(q * q, starts, axis=1)
    assert np.allclose(found, fit, rtol=1e-5)


def test_groups_of_zeros_and_rows_with_nan_keep_their_scales(kernels: KernelSet, make_weights: Make) -> None:
    w = make_weights(6, "plain", 5, 256, "F32")
    w[0] = 0
    w[1, :64] = 0
    w[2, 70] = np.nan
    w[3, 200] = np.inf
    found, losses, old, _ = center(kernels, w, "F32", 4, 64, None, np.ones(256, np.float32), make_means(6, 256))
    assert np.array_equal(found[[0, 2, 3]], old[[0, 2, 3]])
    assert (losses[[0, 2, 3], 1] == 5).all()
    assert found[1, 0] == old[1, 0]
    assert (found[[1, 4], 1:] != old[[1, 4], 1:]).all()


def test_no_scale_changes_its_sign_or_falls_below_the_least(kernels: KernelSet, make_weights: Make) -> None:
    w = make_weights(7, "plain", 40, 512, "F32")
    means = np.full(512, 1e3, np.float32)  # the mean error is all that counts
    found, _, old, _ = center(kernels, w, "F32", 2, 32, None, np.full(512, 1e-6, np.float32), means)
    assert (np.signbit(found) == np.signbit(old)).all()
    assert (np.abs(found) >= np.float32(1e-5)).all()
    found, _, old, _ = center(
        kernels, w, "F32", 2, 32, None, np.ones(512, np.float32), make_means(7, 512), least=float(np.abs(old).max())
    )
    assert (np.abs(found[found != old]) >= np.abs(old).max()).all()


@pytest.mark.parametrize("which", ["spread", "means"])
@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf, "short", "double"])
def test_wrong_columns_are_refused(kernels: KernelSet, reference: KernelSet, which: str, wrong: float | str) -> None:
    given: dict[str, Any] = {"spread": np.ones(8, np.float32), "means": np.ones(8, np.float32)}
    if wrong == "short":
        given[which] = given[which][:7].copy()
    elif wrong == "double":
        given[which] = given[which].astype(np.float64)
    else:
        given[which][3] = wrong
    for each in (kernels, reference):
        with pytest.raises(ValueError, match=f"^{which}: expected"):
            center(each, np.ones((2, 8), np.float32), "F32", 4, 4, None, given["spread"], given["means"])


def test_biases_take_the_mean_error_of_a_group(kernels: KernelSet, make_weights: Make) -> None:
    w, group = make_weights(8, "plain", 20, 300, "F32"), 100
    ones = np.ones(300, np.float32)
    found, _, scales, low = center(kernels, w, "F32", 2, group, None, ones, ones * 0, "fp32", kind="bias")
    e = find_errors(w.astype(np.float64), (scales, low), found, 2, group, "bias")
    assert np.abs(e.reshape(20, 3, group).mean(2)).max() < 1e-6 * np.abs(w).max()


def test_an_unknown_rule_is_refused(kernels: KernelSet, reference: KernelSet) -> None:
    ones, numbers = np.ones(8, np.float32), np.ones((2, 2), np.float32)
    for each in (kernels, reference):
        with pytest.raises(ValueError, match=r"^rule: expected zero or bias"):
            each.center_groups(
                np.ones((2, 8), np.float32), "F32", 4, 4, None, ones, ones, "none", "fp16", 0.0, numbers, numbers,
                numbers.copy(), np.zeros((2, 2)),
            )  # fmt: skip
