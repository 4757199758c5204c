"""Importance from files: shardq's own, and llama.cpp's in both formats, each made here from its published layout."""

import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from importance_files_made import (
    L0,
    MODULES,
    OWN,
    RANDOM,
    own_file,
    put,
    vectors,
)

from shardq.errors import BadImportance, SourceUnreadable
from shardq.importance import allows_both_signs, doubts, load_importance, match, stand_ins
from shardq.importance_files import Entry, Provenance, expand_name, find_entry, join_names, write_importance
from shardq.importance_vectors import VectorRef, read_vector, weights_of
from shardq.vector_cache import VectorCache

# --- our own -------------------------------------------------------------------------------------------------------


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "own.safetensors"
    write_importance(path, OWN, RANDOM)
    found = load_importance(path)
    assert (found.format, found.provenance, found.label) == ("shardq", RANDOM, "own.safetensors")
    assert vectors(path, MODULES) == {
        f"{L0}.self_attn.q_proj": [1, 2, 3, 4],
        f"{L0}.self_attn.v_proj": [1, 2, 3, 4],
        f"{L0}.self_attn.o_proj": [5, 0, 7],
        f"{L0}.mlp.experts.1.gate_proj": [9, 8, 7, 6],
        f"{L0}.mlp.experts.1.down_proj": [2, 3],
    }
    assert stand_ins(match(found, MODULES)) == ()


def test_equal_statistics_give_equal_bytes(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    write_importance(a, OWN, RANDOM)
    write_importance(b, dict(reversed(OWN.items())), RANDOM)
    assert a.read_bytes() == b.read_bytes()
    write_importance(b, OWN, Provenance("text", 64))
    assert load_importance(a).sha256 != load_importance(b).sha256


def test_own_name_goes_before_a_star() -> None:
    own, starred = Entry(0, 1), Entry(4, 1)
    assert find_entry({"a.3.b": own, "a.*.b": starred}, "a.3.b") is own
    assert find_entry({"a.3.b": own, "a.*.b": starred}, "a.4.b") is starred
    assert find_entry({"a.*.b": starred}, "a.x.b") is None
    assert find_entry({"m.*.e.1.b": own, "m.0.e.*.b": starred}, "m.0.e.1.b") is starred


def test_names_in_braces() -> None:
    assert expand_name("a.{b,c}", "") == ("a.b", "a.c")
    assert expand_name("{w1,w3}", "") == ("w1", "w3")
    assert join_names(["a.c", "a.b"]) == "a.{b,c}"
    assert join_names(["b"]) == "b"
    assert expand_name(join_names(["a.*.c", "a.*.b"]), "") == ("a.*.b", "a.*.c")
    with pytest.raises(ValueError, match="no common parent"):
        join_names(["a.b", "c.b"])


BAD_NAMES = ["", "a.{b}", "a.{b,}", "a{b,c", "a}b,c{", "{a,b}.{c,d}", "a*.b", "*.*", "{a,*}", "x" * 501]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_bad_names_are_neither_written_nor_read(name: str, tmp_path: Path) -> None:
    with pytest.raises(BadImportance, match="not a name of modules"):
        write_importance(tmp_path / "f", {name: np.ones(2)}, RANDOM)
    with pytest.raises(BadImportance, match="not a name of modules"):
        load_importance(put(tmp_path, own_file({name: [1, 2]})))


HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty": (own_file({}), "holds no vectors"),
    "NaN": (own_file({"a": [1, np.nan]}), "negative or not finite"),
    "infinite": (own_file({"a": [1, np.inf]}), "negative or not finite"),
    "negative": (own_file({"a": [1, -1]}), "negative or not finite"),
    "all zero": (own_file({"a": [0, 0]}), "all values are zero"),
    "two dimensions": (own_file({"a": [[1, 2]]}), "expected F32 and one dimension"),
    "no dimension": (own_file({"a": 1}), "expected F32 and one dimension"),
    "no values": (own_file({"a": []}), "expected F32 and one dimension"),
    "integers": (own_file({"a": [1]}, dtype="I32"), "expected F32 and one dimension"),
    "twice": (own_file({"a.b": [1], "a.{b,c}": [1]}), "'a.b' has two vectors"),
    "a model": (own_file({"a": [1]}, {"format": "pt"}), "something else"),
    "newer": (own_file({"a": [1]}, {"format_version": "3"}), "format version '3'"),
    "infinite means": (own_file({"a": [1], "mean a": [np.inf]}), "means are not finite"),
    "means of another length": (own_file({"a": [1, 2], "mean a": [1]}), "expected means like it"),
    "means of nothing": (own_file({"a": [1], "mean b": [1]}), "means of what it holds no vector of: .b."),
    "data": (own_file({"a": [1]}, {"data": "magic"}), "data 'magic'"),
    "tokens": (own_file({"a": [1]}, {"tokens": "-5"}), "tokens '-5' is not a whole number"),
    "many tokens": (own_file({"a": [1]}, {"tokens": "9" * 5000}), "is not a whole number"),
    "cut": (own_file({"a": [1, 2]})[:-1], "truncated"),
    "long": (own_file({"a": [1, 2]}) + b"x", "trailing"),
    "dtype": (own_file({"a": [1]}).replace(b'"F32"', b'"F33"'), "unknown dtype"),
}


@pytest.mark.parametrize("lie", HOSTILE)
def test_hostile_file_is_refused(lie: str, tmp_path: Path) -> None:
    data, message = HOSTILE[lie]
    with pytest.raises(BadImportance, match=message) as caught:
        load_importance(put(tmp_path, data))
    assert "stats.dat" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("vector", [[np.nan], [-1.0], [0.0, 0.0], [[1.0]], [1e39]])
def test_what_would_be_refused_is_not_written(vector: Any, tmp_path: Path) -> None:
    with np.errstate(over="ignore"), pytest.raises(BadImportance, match="expected one dimension of finite values"):
        write_importance(tmp_path / "f", {"a": np.array(vector)}, RANDOM)
    with pytest.raises(BadImportance, match="two vectors"):
        write_importance(tmp_path / "f", {"a.b": np.ones(1), "a.{b,c}": np.ones(1)}, RANDOM)
    assert not (tmp_path / "f").exists()


def test_missing_and_wrong_modules_are_listed_before_anything_is_read(tmp_path: Path) -> None:
    path = tmp_path / "own"
    write_importance(path, OWN, RANDOM)
    found = load_importance(path)
    path.unlink()
    wanted = MODULES | {f"{L0}.self_attn.o_proj": (4, 8), "lm_head": (9, 4), f"{L0}.mlp.experts.2.down_proj": (4, 2)}
    with pytest.raises(BadImportance) as caught:
        match(found, wanted)
    told = str(caught.value)
    assert f"own lacks 2 of the 7 modules to be quantized: lm_head, {L0}.mlp.experts.2.down_proj" in told
    assert f"does not fit 1: {L0}.self_attn.o_proj (8 columns, 3 values)" in told
    many = {f"m{n}.x": (1, 1) for n in range(9)}
    with pytest.raises(BadImportance, match=r"m0\.x, .*m5\.x and 3 more"):
        match(found, many)


def test_no_file_is_unreadable(tmp_path: Path) -> None:
    for path in (tmp_path / "nothing", tmp_path):
        with pytest.raises(SourceUnreadable):
            load_importance(path)


# --- workers -------------------------------------------------------------------------------------------------------


def test_reference_is_small_and_frozen(tmp_path: Path) -> None:
    path = tmp_path / "own"
    write_importance(path, OWN, RANDOM)
    ref = match(load_importance(path), MODULES)[f"{L0}.self_attn.o_proj"]
    assert len(pickle.dumps(ref)) < 500 + len(str(path))
    assert hash(ref) == hash(pickle.loads(pickle.dumps(ref)))


def test_changed_file_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "own"
    write_importance(path, OWN, RANDOM)
    ref = match(load_importance(path), MODULES)[f"{L0}.self_attn.o_proj"]
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    with pytest.raises(BadImportance, match="own has changed since the plan"):
        read_vector(ref)


def test_cache_keeps_the_last_vectors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "own"
    write_importance(path, OWN, RANDOM)
    refs = list(match(load_importance(path), MODULES).values())
    reads: list[VectorRef] = []

    def read(ref: VectorRef) -> Any:
        reads.append(ref)
        return read_vector(ref)

    monkeypatch.setattr("shardq.importance_vectors.read_vector", read)
    cache = VectorCache(limit=2)
    for index in (0, 1, 0, 2, 0, 3, 3, 0, 2):  # q_proj and v_proj have the same vector
        assert np.array_equal(cache.get(refs[index]), weights_of(read_vector(refs[index])))
    assert reads == [refs[0], refs[2], refs[3], refs[2]]
    with pytest.raises(ValueError, match="read-only"):
        cache.get(refs[0])[0] = 1


def test_floor_is_a_ten_thousandth_of_the_mean() -> None:
    values = np.array([0, 1e-9, 3, 5], np.float32)
    weights = weights_of(values)
    assert weights.dtype == np.float32
    assert np.array_equal(weights, np.array([2e-4, 2e-4, 3, 5], np.float32) / 2)
    assert np.array_equal(weights_of(np.zeros(3, np.float32)), np.ones(3, np.float32))


@given(st.lists(st.floats(0, 2.0**120, width=32), min_size=1, max_size=40), st.integers(-20, 7))
def test_weights_are_in_range_and_know_no_scale(values: list[float], power: int) -> None:
    array = np.array(values, np.float32)
    array[array < 2.0**-90] = 0  # so that scaling stays exact
    weights = weights_of(array)
    assert (weights > 0).all()
    assert weights.max() <= 2 * len(values)
    assert np.array_equal(weights_of(np.ldexp(array, power)), weights)
    kept = weights > 2e-4
    if array.any():
        assert len(set((np.frexp(weights[kept])[0] == np.frexp(array[kept])[0]).tolist())) <= 1


def test_low_bits_and_signs() -> None:
    assert doubts(RANDOM, 4) == doubts(Provenance("random ids", 256), 2) == doubts(Provenance("text", 64), 2) == ()
    assert "64 random ids" in doubts(RANDOM, 2)[0]
    assert not allows_both_signs(RANDOM, 2)
    assert not allows_both_signs(Provenance("text", 512), 3)
    assert allows_both_signs(Provenance("text"), 2)
    assert allows_both_signs(Provenance("random ids", 4096), 4)


def test_planning_needs_no_numpy() -> None:
    code = "import sys, shardq.importance; print('numpy' in sys.modules)"
    out = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True, cwd="/")
    assert out.stdout.strip() == "False"
