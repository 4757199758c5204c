"""H and its factor in one matrix: R is that of what is factored, H stays below, and no other memory is taken."""

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from shardq.tune import hessians
from shardq.tune.hessians import Factored, factor_hessian

COLUMNS = 150


@pytest.fixture(autouse=True)
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hessians, "STEP", 64)  # two whole ones and a part


def make_hessian(kind: Any = np.float64) -> NDArray[Any]:
    x = np.random.default_rng(0).standard_normal((400, COLUMNS)) * np.linspace(0.2, 3, COLUMNS)
    x[:, 1:] += x[:, :-1]
    made: NDArray[Any] = (x.T @ x).astype(kind)
    return made


def upper(found: Factored) -> NDArray[np.float64]:
    return np.triu(found.both.double().numpy())


@pytest.mark.parametrize(("kind", "close"), [(np.float64, 1e-12), (np.float32, 1e-5)])
@pytest.mark.parametrize("order", ["static", "none"])
def test_the_factor_is_that_of_h_in_its_order(order: Any, kind: Any, close: float) -> None:
    hessian = make_hessian(kind)
    found = factor_hessian(hessian.copy(), damping=0.02, shrinkage=0.3, order=order)
    ordered = hessian.astype(np.float64)[np.ix_(found.chosen, found.chosen)]
    mean = np.diagonal(hessian).mean()
    expected = 0.7 * ordered + np.diag(0.3 * np.diagonal(ordered) + 0.02 * mean)
    np.testing.assert_allclose(upper(found) @ upper(found).T, expected, atol=close * mean)
    assert found.damping == 0.02
    largest = np.argsort(-np.diagonal(hessian), kind="stable")
    np.testing.assert_array_equal(found.chosen, largest if order == "static" else np.arange(COLUMNS))


def test_h_stays_below_its_factor_in_its_own_memory() -> None:
    hessian = make_hessian(np.float32)
    given = hessian.copy()
    found = factor_hessian(given)
    assert np.shares_memory(given, found.both.numpy())
    ordered = hessian[np.ix_(found.chosen, found.chosen)]
    np.testing.assert_array_equal(np.tril(found.both.numpy(), -1), np.tril(ordered, -1))
    np.testing.assert_array_equal(found.diagonal, np.diagonal(hessian))


def test_rows_are_weighed_by_h_and_not_by_what_was_factored() -> None:
    hessian = make_hessian()
    found = factor_hessian(hessian.copy(), damping=0.5, shrinkage=0.9)
    e = np.random.default_rng(1).standard_normal((5, COLUMNS))
    np.testing.assert_allclose(
        found.weigh(torch.from_numpy(e[:, found.chosen])), ((e @ hessian) * e).sum(1), rtol=1e-10
    )


@pytest.mark.parametrize(("begin", "end"), [(0, 40), (40, 90), (90, COLUMNS)])
def test_feedback_is_the_factor_by_its_diagonal(begin: int, end: int) -> None:
    found = factor_hessian(make_hessian())
    r = upper(found)
    expected = np.triu(r / np.diagonal(r), 1)[:end, begin:end]
    np.testing.assert_allclose(found.feedback(begin, end).numpy(), expected, rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(upper(found), r)  # is no view that was changed


def test_damping_that_is_not_enough_begins_anew_from_h() -> None:
    x = np.random.default_rng(0).standard_normal((20, COLUMNS))
    hessian = x.T @ x  # of rank 20
    found = factor_hessian(hessian.copy(), damping=0.0, order="none")
    assert found.damping > 0
    expected = hessian + np.diag(np.full(COLUMNS, found.damping * np.diagonal(hessian).mean()))
    np.testing.assert_allclose(upper(found) @ upper(found).T, expected, atol=1e-9)
    np.testing.assert_array_equal(np.tril(found.both.numpy(), -1), np.tril(hessian, -1))
