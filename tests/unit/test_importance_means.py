"""Means of inputs in a file of importance: written, read, moved by folds, and what searches make of them."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from importance_files_made import RANDOM

from shardq.errors import BadImportance
from shardq.importance import Importance, load_importance, match
from shardq.importance_files import Provenance, write_importance
from shardq.importance_vectors import (
    FLOOR,
    BothRef,
    SizesRef,
    VectorRef,
    has_means,
    read_means,
    weights_of,
)
from shardq.vector_cache import VectorCache

TEXT = Provenance("text", 8192, None, "model", None, "text")
SQUARES = {"a.{b,c}": np.array([4.0, 9.0, 1e-9, 16.0]), "a.d": np.array([1.0, 2.0])}
MEANS = {"a.{b,c}": np.array([1.5, -3.0, 0.0, -0.5])}
SHAPES = {"a.b": (3, 4), "a.c": (3, 4), "a.d": (3, 2)}


def write(path: Path, means: dict[str, np.ndarray] = MEANS) -> Importance:
    write_importance(path, SQUARES, TEXT, means)
    return load_importance(path)


def test_means_come_back_beside_their_vectors(tmp_path: Path) -> None:
    refs = match(write(tmp_path / "f"), SHAPES)
    assert [has_means(refs[m]) for m in SHAPES] == [True, True, False]
    found = read_means(refs["a.c"])
    assert found.means.dtype == found.spread.dtype == np.float32
    # the mean square is 7.25: two halvings bring it into [1, 2)
    assert found.means.tolist() == [0.75, -1.5, 0.0, -0.25]
    least = np.float32(FLOOR * (29 + 1e-9) / 4 / 4)
    assert np.allclose(found.spread, [(4 - 2.25) / 4, least, least, (16 - 0.25) / 4])
    whole = weights_of(np.array([4.0, 9.0, 1e-9, 16.0]))
    assert np.allclose(found.spread[[0, 3]] + found.means[[0, 3]] ** 2, whole[[0, 3]])


def test_an_odd_power_moves_means_by_the_root_of_two(tmp_path: Path) -> None:
    write_importance(tmp_path / "f", {"a": np.array([2.0, 3.0])}, TEXT, {"a": np.array([1.0, 1.0])})
    found = read_means(match(load_importance(tmp_path / "f"), {"a": (1, 2)})["a"])
    assert np.allclose(found.means, 2**-0.5)
    assert found.spread.tolist() == [0.5, 1.0]


def test_a_fold_moves_means_as_it_moves_inputs(tmp_path: Path) -> None:
    ref = match(write(tmp_path / "f"), SHAPES)["a.b"]
    powers = np.array([1, -1, 0, 2], np.int8).tobytes()
    squares = {"a": np.array([16.0, 2.25, 1e-9, 256.0])}
    write_importance(tmp_path / "g", squares, TEXT, {"a": np.array([3.0, -1.5, 0.0, -2.0])})
    expected = read_means(match(load_importance(tmp_path / "g"), {"a": (1, 4)})["a"])
    both = BothRef(ref, SizesRef(bytes(4), 2, powers))
    for found in (read_means(replace(ref, powers=powers)), read_means(both)):
        assert np.allclose(found.means, expected.means)
        assert np.allclose(found.spread, expected.spread, rtol=1e-6)


def test_files_without_means_are_as_they_were(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    write_importance(old, SQUARES, RANDOM)
    write(new)
    assert b'"format_version":"1"' in old.read_bytes().replace(b" ", b"")
    assert b'"format_version":"2"' in new.read_bytes().replace(b" ", b"")
    assert not any(map(has_means, match(load_importance(old), SHAPES).values()))
    assert not has_means(SizesRef(bytes(4), 2))


@pytest.mark.parametrize(
    "means", [{"a.d": np.ones(3)}, {"a.d": np.array([np.nan, 1])}, {"a.x": np.ones(2)}, {"a.b": np.ones(4)}]
)
def test_means_that_would_be_refused_are_not_written(means: dict[str, np.ndarray], tmp_path: Path) -> None:
    with pytest.raises(BadImportance, match="means of"):
        write(tmp_path / "f", means)
    assert not (tmp_path / "f").exists()


def test_the_cache_gives_the_same_means_again(tmp_path: Path) -> None:
    refs = match(write(tmp_path / "f"), SHAPES)
    cache = VectorCache(limit=1)
    first = cache.get_means(refs["a.b"])
    assert cache.get_means(refs["a.b"]) is first
    assert not first.means.flags.writeable
    other = replace(refs["a.b"], powers=bytes(4))
    assert isinstance(other, VectorRef)
    cache.get_means(other)
    assert cache.get_means(refs["a.b"]) is not first
