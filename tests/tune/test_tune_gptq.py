"""GPTQ of one matrix: what H says of its errors, and where it must be round-to-nearest."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from shardq.errors import BadOption, NonFiniteWeight
from shardq.kernels import load
from shardq.quantizers.decode import decode_rows
from shardq.schemes import Scheme, parse_name
from shardq.tune import gptq
from shardq.tune.gptq import Compensated, quantize_gptq
from shardq.tune.hessians import factor_hessian
from shardq.tune.settings import Scales

pytestmark = pytest.mark.usefixtures("one_thread")

ROWS, COLUMNS = 24, 200  # groups of 64 have a short last one
Matrix = NDArray[np.float32]
SCHEMES: dict[str, Scheme] = {
    "int4": replace(parse_name("W4A16"), group_size=64),
    "int4 asymmetric": replace(parse_name("W4A16"), group_size=64, symmetric=False),
    "int4 of compressed-tensors": replace(parse_name("W4A16"), group_size=64, numbers="compressed_tensors"),
    "int3 whole rows": replace(parse_name("W3A16"), group_size=-1),
    "int2": replace(parse_name("W2A16"), group_size=32),
    "affine of MLX": replace(parse_name("W4A16"), group_size=64, symmetric=False, numbers="mlx", scale="weight"),
    "mxfp4": parse_name("MXFP4"),
    "nvfp4": parse_name("NVFP4"),
}


def make_weight(seed: int = 0) -> Matrix:
    return np.random.default_rng(seed).standard_normal((ROWS, COLUMNS)).astype(np.float32) * np.float32(0.05)


def make_hessian(seed: int = 1, tokens: int = 600) -> NDArray[np.float64]:
    """Of inputs that depend on each other, with columns of very different size."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((tokens, COLUMNS)) @ (rng.standard_normal((COLUMNS, COLUMNS)) * 0.3 + np.eye(COLUMNS))
    x *= np.exp(rng.standard_normal(COLUMNS))
    found: NDArray[np.float64] = x.T @ x / tokens
    return found


def run(
    weight: Matrix, hessian: NDArray[Any], scheme: Scheme, *, block: int = 128, scales: Scales = "search",
    **options: Any,
) -> Compensated:  # fmt: skip
    amax = float(np.abs(weight).max()) if scheme.reach != "group" else None
    factored = factor_hessian(hessian.copy(), **options)
    return quantize_gptq(weight, factored, scheme, load(), block=block, scales=scales, amax=amax, stored="BF16")


def values(found: Compensated, scheme: Scheme) -> Matrix:
    return decode_rows(found.quantized, scheme, load())


@pytest.mark.parametrize("name", SCHEMES)
def test_errors_by_h_are_much_less_than_the_nearest_codes(name: str) -> None:
    weight, hessian, scheme = make_weight(), make_hessian(), SCHEMES[name]
    found = run(weight, hessian, scheme)
    assert (found.errors <= found.nearest_errors).all()
    assert found.errors.sum() < 0.7 * found.nearest_errors.sum()
    e = (weight - values(found, scheme)).astype(np.float64)
    np.testing.assert_allclose(found.errors, ((e @ hessian) * e).sum(1), rtol=1e-9)
    assert factor_hessian(hessian).damping == 0.01


@pytest.mark.parametrize(
    ("name", "scales"),
    [(n, s) for n in SCHEMES for s in ("search", "rtn") if (n, s) != ("affine of MLX", "rtn")],
)  # MLX takes codes from scales that are not rounded yet, so that these are not the nearest
def test_independent_inputs_leave_the_nearest_codes(name: str, scales: str) -> None:
    weight, scheme = make_weight(), SCHEMES[name]
    diagonal = np.diag(np.linspace(0.1, 4, COLUMNS))
    found = run(weight, diagonal, scheme, scales=scales)
    exact = run(weight, diagonal * 7, scheme, scales=scales, order="none", block=3, damping=0)
    np.testing.assert_array_equal(found.quantized.codes, exact.quantized.codes)
    np.testing.assert_array_equal(found.errors, found.nearest_errors)


def slow_gptq(weight: Matrix, hessian: NDArray[np.float64], scales: Matrix, group: int, chosen: list[int]) -> Matrix:
    """One column at a time, each time with the inverse of what is left of H: the definition, in double precision."""
    left, codes = weight.astype(np.float64), np.empty(weight.shape)
    remaining = list(chosen)
    while remaining:
        column, inverse = remaining[0], np.linalg.inv(hessian[np.ix_(remaining, remaining)])
        s = scales[:, column // group].astype(np.float64)
        codes[:, column] = np.clip(np.rint(left[:, column] / s), -8, 7)
        error = (left[:, column] - codes[:, column] * s) / inverse[0, 0]
        left[:, remaining] -= np.outer(error, inverse[0])
        remaining = remaining[1:]
    return codes


@pytest.mark.parametrize("order", ["static", "none"])
@pytest.mark.parametrize("block", [1, 16, 128, 999])
def test_blocks_and_factors_are_a_short_way_to_the_definition(order: str, block: int) -> None:
    weight, hessian, scheme = make_weight(), make_hessian(), SCHEMES["int4"]
    found = run(weight, hessian, scheme, order=order, block=block, damping=0.05)
    damped = hessian + np.eye(COLUMNS) * 0.05 * np.diagonal(hessian).mean()
    chosen = np.argsort(-np.diagonal(hessian), kind="stable").tolist() if order == "static" else list(range(COLUMNS))
    expected = slow_gptq(weight, damped, found.quantized.scales, 64, chosen)
    moved = found.errors < found.nearest_errors
    assert moved.all()
    assert (found.quantized.codes.astype(np.int64) - 8 == expected).mean() > 0.999  # fp32 may round a tie otherwise


def test_rows_get_the_same_codes_in_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, hessian, scheme = make_weight(), make_hessian(), SCHEMES["int4"]
    whole = run(weight, hessian, scheme)
    monkeypatch.setattr(gptq, "TILE_WEIGHTS", 7 * COLUMNS)  # of 24 rows
    tiled = run(weight, hessian, scheme)
    np.testing.assert_array_equal(tiled.quantized.codes, whole.quantized.codes)
    np.testing.assert_allclose(tiled.errors, whole.errors, rtol=1e-9)
    np.testing.assert_allclose(tiled.nearest_errors, whole.nearest_errors, rtol=1e-9)


def test_the_largest_inputs_first_is_better() -> None:
    weight, hessian, scheme = make_weight(), make_hessian(), SCHEMES["int2"]
    first, plain = (run(weight, hessian, scheme, order=order).errors.sum() for order in ("static", "none"))
    assert first < plain


def test_a_search_is_better_than_the_extremes() -> None:
    weight, hessian, scheme = make_weight(), make_hessian(), SCHEMES["int2"]
    searched, plain = (run(weight, hessian, scheme, scales=scales).errors.sum() for scales in ("search", "rtn"))
    assert searched < plain


def test_dead_columns_keep_their_nearest_codes() -> None:
    weight, hessian, scheme = make_weight(), make_hessian(), SCHEMES["int4"]
    dead = [3, 64, 199]
    hessian[dead] = hessian[:, dead] = 0
    for damping in (0.01, 0.0):
        found = run(weight, hessian, scheme, damping=damping)
        scales = np.repeat(found.quantized.scales, 64, 1)[:, dead]
        nearest = np.clip(np.rint(weight[:, dead] / scales), -8, 7) + 8
        np.testing.assert_array_equal(found.quantized.codes[:, dead], nearest)


def test_no_inputs_at_all_is_round_to_nearest() -> None:
    weight, scheme = make_weight(), SCHEMES["int4"]
    zero = run(weight, np.zeros((COLUMNS, COLUMNS)), scheme)
    assert (zero.errors == 0).all()
    scales = np.repeat(zero.quantized.scales, 64, 1)[:, :COLUMNS]
    np.testing.assert_array_equal(zero.quantized.codes, np.clip(np.rint(weight / scales), -8, 7) + 8)


def test_too_few_tokens_are_damped_and_told() -> None:
    hessian = make_hessian(tokens=20)
    found = run(make_weight(), hessian, SCHEMES["int4"], damping=0)
    assert factor_hessian(hessian, damping=0).damping > 0
    assert found.errors.sum() < 0.7 * found.nearest_errors.sum()


@pytest.mark.parametrize("name", SCHEMES)
def test_without_what_columns_have_in_common_nothing_is_moved(name: str) -> None:
    found = run(make_weight(), make_hessian(), SCHEMES[name], shrinkage=1.0)
    np.testing.assert_array_equal(found.errors, found.nearest_errors)
    alone = run(make_weight(), np.diag(np.diagonal(make_hessian())), SCHEMES[name])
    np.testing.assert_array_equal(found.quantized.codes, alone.quantized.codes)


def test_shrinkage_is_a_smaller_h_off_its_diagonal() -> None:
    weight, hessian, scheme = make_weight(), make_hessian(), SCHEMES["int4"]
    found = run(weight, hessian, scheme, shrinkage=0.3)
    smaller = 0.7 * hessian + 0.3 * np.diag(np.diagonal(hessian))
    expected = slow_gptq(
        weight, smaller + np.eye(COLUMNS) * 0.01 * np.diagonal(hessian).mean(), found.quantized.scales, 64,
        np.argsort(-np.diagonal(hessian), kind="stable").tolist(),
    )  # fmt: skip
    moved = found.errors < found.nearest_errors
    assert moved.sum() > ROWS // 2
    assert (found.quantized.codes.astype(np.int64) - 8 == expected)[moved].mean() > 0.999


def test_shrinkage_helps_where_few_tokens_stand_for_many() -> None:
    weight, many, scheme = make_weight(), make_hessian(tokens=4000), SCHEMES["int4"]
    few = make_hessian(tokens=COLUMNS // 2)  # the first of them

    def error(shrinkage: float) -> float:
        e = (weight - values(run(weight, few, scheme, shrinkage=shrinkage), scheme)).astype(np.float64)
        return float(((e @ many) * e).sum())

    assert error(0.3) < 0.9 * error(0.0)


def test_single_precision_and_any_scale_of_h_give_the_same() -> None:
    weight, hessian, scheme = make_weight(), make_hessian(), SCHEMES["int4"]
    double, single, larger = (
        run(weight, h, scheme).quantized.codes for h in (hessian, hessian.astype(np.float32), hessian * 1024)
    )
    np.testing.assert_array_equal(double, larger)
    assert (double == single).mean() > 0.99


REFUSED: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "blocks of GGUF": (
        lambda: run(make_weight(), make_hessian(), replace(SCHEMES["int4"], block="Q4_K")),
        BadOption,
        "needs the scales first",
    ),
    "damping": (lambda: run(make_weight(), make_hessian(), SCHEMES["int4"], damping=2), BadOption, "0 to 1"),
    "shrinkage": (
        lambda: run(make_weight(), make_hessian(), SCHEMES["int4"], shrinkage=1.1),
        BadOption,
        "shrinkage of 1.1: expected 0 to 1",
    ),
    "not positive": (
        lambda: run(make_weight(), -10 * make_hessian() + np.diag(np.diagonal(make_hessian())), SCHEMES["int4"]),
        BadOption,
        "cannot be factored",
    ),
    "infinite h": (
        lambda: run(make_weight(), make_hessian() * np.inf, SCHEMES["int4"]),
        NonFiniteWeight,
        "activations overflow",
    ),
    "nan": (
        lambda: run(make_weight() * np.float32(np.nan), make_hessian(), SCHEMES["int4"]),
        NonFiniteWeight,
        "groups hold NaN",
    ),
    "shape": (lambda: run(make_weight(), np.eye(3), SCHEMES["int4"]), ValueError, r"expected H \[200, 200\]"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused(case: str) -> None:
    call, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        call()
