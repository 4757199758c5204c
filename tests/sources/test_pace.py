"""How fast bytes move, measured: downloads and uploads at a pace."""

import os
import threading
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from shardq.destinations.lfs import bytes_chunks, slowed
from shardq.errors import BadOption
from shardq.limits import LEAST_RATE_BYTES_S, Limits
from shardq.pace import Pace
from shardq.sources.hub import open_hub
from shardq.sources.hub_errors import RetryPolicy

QUICK = RetryPolicy(failures=3, first_wait_s=0.01, timeout_s=5.0)


def test_downloads_of_all_threads_keep_the_pace(hub: Any, fake_hub_module: ModuleType, tmp_path: Path) -> None:
    files = {f"{n}.safetensors": os.urandom(400_000) for n in "ab"}
    hub.repos["org/name"] = fake_hub_module.Repo()
    hub.repos["org/name"].commit(files)
    taken = {}
    for rate in (None, 1_000_000):
        source = open_hub("org/name", endpoint=hub.url, retry=QUICK, pace=Pace(rate))
        reports: list[int] = []
        threads = [
            threading.Thread(target=source.fetch, args=(name, tmp_path / f"{rate}-{name}", reports.append))
            for name in files
        ]
        began_s = time.monotonic()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        taken[rate] = time.monotonic() - began_s
        assert {n: (tmp_path / f"{rate}-{n}").read_bytes() for n in files} == files
        assert sum(reports) == 800_000
    assert 0.75 <= taken[1_000_000] < 3.0  # 800 kB at 1 MB/s
    assert taken[1_000_000] > taken[None]


def test_uploads_keep_the_pace() -> None:
    chunks = slowed(lambda begin, end: (bytes(50_000) for _ in range(begin, end, 50_000)), Pace(1_000_000))
    began_s = time.monotonic()
    assert sum(map(len, chunks(0, 300_000))) == 300_000
    assert 0.29 <= time.monotonic() - began_s < 2.0
    assert list(slowed(bytes_chunks(b"abc"), Pace())(1, 3)) == [b"bc"]


def test_time_in_which_nothing_moved_is_not_made_up_for() -> None:
    pace = Pace(1_000_000)
    pace.took(1)
    time.sleep(0.2)
    began_s = time.monotonic()
    pace.took(200_000)
    assert time.monotonic() - began_s >= 0.19


def test_what_ticks_may_end_a_wait() -> None:
    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Pace(10).took(1000, stop)


def test_a_pace_that_looks_like_a_dead_link_is_refused() -> None:
    assert Limits(max_rate_bytes_s=LEAST_RATE_BYTES_S).max_rate_bytes_s == LEAST_RATE_BYTES_S
    with pytest.raises(BadOption, match="dead link"):
        Limits(max_rate_bytes_s=LEAST_RATE_BYTES_S - 1)
    with pytest.raises(BadOption, match="Xet"):
        Limits(max_rate_bytes_s=10**6, xet=True)
