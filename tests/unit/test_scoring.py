"""The harm of a matrix: a share of its output, by importance and without, whichever is larger."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from shardq import make_recipe
from shardq.headers import read_checkpoint
from shardq.importance import load_importance, match
from shardq.importance_files import Provenance, write_importance
from shardq.layouts import find_layout
from shardq.schemes import parse_scheme
from shardq.scoring import BETWEEN, Candidate, Subject, score_all, weigh_shares
from shardq.search import default_search
from shardq.sources import open_source
from shardq.weights import find_weights

ROWS, COLUMNS, MODULE = 32, 128, "model.layers.0.mlp.up_proj"
SCHEME = find_layout("auto_round").settle(parse_scheme("W2A16G64").scheme)

Score = Callable[..., list[float]]


@pytest.fixture
def score(tmp_path: Path) -> Score:
    """A function that gives the harms of one matrix kept, rounded, and searched where there is importance."""
    w = np.random.default_rng(5).standard_normal((ROWS, COLUMNS)).astype(np.float32)
    save_file({f"{MODULE}.weight": w}, tmp_path / "model.safetensors")
    source = open_source(str(tmp_path))
    tensor = find_weights(read_checkpoint(source), make_recipe("W4A16")).tensors[f"{MODULE}.weight"]

    def harms(importance: np.ndarray | None = None, sensitivity: float = 1.0) -> list[float]:
        vector, search = None, None
        if importance is not None:
            write_importance(tmp_path / "e.safetensors", {MODULE: importance}, Provenance("text", 100))
            vector = match(load_importance(tmp_path / "e.safetensors"), {MODULE: (ROWS, COLUMNS)})[MODULE]
            search = default_search(SCHEME, weighted=True)
        subject = Subject(tensor, (Candidate(None, None), Candidate(SCHEME, search)), vector, sensitivity)
        return list(score_all([subject], source, False, 1)[MODULE])

    return harms


def test_equal_importance_is_none_but_for_the_search(score: Score) -> None:
    kept, rounded = score()
    assert kept == 0
    assert 0.05**BETWEEN < rounded < 1
    assert 0 < score(np.ones(COLUMNS, np.float32))[1] < rounded


def test_a_massive_column_does_not_hide_the_others(score: Score) -> None:
    """The search spares it, so by importance hardly anything is lost, and the rest is hurt more than without."""
    massive = np.ones(COLUMNS, np.float32)
    massive[3] = massive[70] = 1e6
    assert score(massive)[1] > score(np.ones(COLUMNS, np.float32))[1]


def test_sensitivity_multiplies(score: Score) -> None:
    assert score(sensitivity=3.0)[1] == pytest.approx(3 * score()[1])


def test_harm_grows_with_the_square_of_a_share_and_less_between_matrices() -> None:
    """Of one matrix 16 times the error does 256 times the harm; of another that always has as much more, 194 times."""
    shares = np.array([0.0, 0.32, 0.02, 0.02 / 16])
    one, other = weigh_shares(shares), weigh_shares(16 * shares)
    assert one[0] == other[0] == 0
    assert one[1:] == pytest.approx([256 * 0.02**BETWEEN, 0.02**BETWEEN, 0.02**BETWEEN / 256])
    assert other == pytest.approx(16**1.9 * one)


def test_shares_that_are_no_numbers_leave_the_others_alone() -> None:
    assert weigh_shares(np.zeros(2)).tolist() == [0, 0]
    with_inf = weigh_shares(np.array([np.inf, 0.04, np.nan]))
    assert with_inf[1] == weigh_shares(np.array([0.04]))[0] == pytest.approx(0.04**BETWEEN)
    assert not np.isfinite(with_inf[[0, 2]]).any()
