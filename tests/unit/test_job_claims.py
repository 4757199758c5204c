"""Claims: one of many gets each, what is not renewed is taken over once, by the clock of the file server."""

import os
import threading
import time
from pathlib import Path

import pytest

from shardq.nodes import claims as module
from shardq.nodes.claims import Claims

UNITS = [f"{n:05d}" for n in range(40)]
LONG_S = 1000.0


def age(path: Path, seconds: float) -> None:
    then = path.stat().st_mtime - seconds
    os.utime(path, (then, then))


def test_takes_the_first_that_are_free(tmp_path: Path) -> None:
    a, b = Claims(tmp_path, LONG_S), Claims(tmp_path, LONG_S)
    assert a.take(UNITS, 3) == UNITS[:3]
    assert b.take(UNITS, 2) == UNITS[3:5]
    assert a.take(UNITS[:5], 5) == []


def test_one_of_many_gets_each(tmp_path: Path) -> None:
    """Free ones, and those that were left."""
    assert sorted(taken_by_six(tmp_path)) == UNITS
    assert taken_by_six(tmp_path) == []
    for path in tmp_path.glob("0*"):
        age(path, 2 * LONG_S)
    assert sorted(taken_by_six(tmp_path)) == UNITS


def taken_by_six(folder: Path) -> list[str]:
    taken: list[str] = []

    def take() -> None:
        taken.extend(Claims(folder, LONG_S).take(UNITS, len(UNITS)))

    threads = [threading.Thread(target=take) for _ in range(6)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    return taken


def test_left_after_the_time_and_not_before(tmp_path: Path) -> None:
    a, b = Claims(tmp_path, LONG_S), Claims(tmp_path, LONG_S)
    a.take(UNITS, 1)
    age(tmp_path / "00000.0", LONG_S - 10)
    assert b.take(UNITS[:1], 1) == []
    age(tmp_path / "00000.0", 20)
    assert b.take(UNITS[:1], 1) == UNITS[:1]
    assert a.take(UNITS[:1], 1) == []  # the old claim counts no more
    assert (tmp_path / "00000.1").exists()


def test_clock_is_that_of_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine whose own clock is wrong takes nothing over."""
    a, b = Claims(tmp_path, LONG_S), Claims(tmp_path, LONG_S)
    a.take(UNITS, 1)
    monkeypatch.setattr(time, "time", lambda: 4e9)
    assert b.take(UNITS[:1], 1) == []


def test_renewed_while_entered_and_given_back_after(tmp_path: Path) -> None:
    stale_s = 0.5
    other = Claims(tmp_path, stale_s)
    with Claims(tmp_path, stale_s) as claims:
        claims.take(UNITS, 2)
        claims.drop(UNITS[1])
        time.sleep(3 * stale_s)
        assert other.take(UNITS[:2], 2) == UNITS[1:2]
    assert other.take(UNITS[:1], 1) == UNITS[:1]
    assert len(list(tmp_path.glob(".clock-*"))) == 1  # of the other


def test_release(tmp_path: Path) -> None:
    a, b = Claims(tmp_path, LONG_S), Claims(tmp_path, LONG_S)
    a.take(UNITS, 1)
    a.release(UNITS[0])
    assert b.take(UNITS[:1], 1) == UNITS[:1]


def test_renewal_where_times_cannot_be_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "00000.0"
    path.write_bytes(b"{}")
    os.utime(path, (1, 1))

    def utime(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(module.os, "utime", utime)
    module._renew(path)
    assert path.stat().st_mtime > 1
    assert path.read_bytes() == b"{}"


def test_count_of_the_living(tmp_path: Path) -> None:
    a, b = Claims(tmp_path, LONG_S), Claims(tmp_path, LONG_S)
    a.take(UNITS, 1)
    assert b.workers() == 2
    for path in tmp_path.glob(".clock-*"):
        age(path, 2 * LONG_S)
    assert b.workers() == 1
