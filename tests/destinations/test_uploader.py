"""The background uploader: order, errors, figures, and a stop that does not wait for the network."""

import hashlib
import select
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from shardq.destinations.base import StoredFile
from shardq.destinations.hub import HubDestination
from shardq.destinations.watched import THREAD, AbandonedError, Meter, run_watched
from shardq.errors import ChecksumMismatch, TaskFailed
from shardq.sources.hub_errors import RetryPolicy
from shardq.uploader import Uploaded, Uploader

QUICK = RetryPolicy(failures=3, first_wait_s=0.01, longest_wait_s=0.02, timeout_s=30.0)
LIMIT_S = 20.0

MakeFile = Callable[[str, int], tuple[Path, StoredFile]]


@pytest.fixture
def destination(hub: Any) -> HubDestination:
    destination = HubDestination("org/quantized", endpoint=hub.url, retry=QUICK)
    destination.prepare()
    return destination


@pytest.fixture
def make_file(tmp_path: Path) -> MakeFile:
    def make(name: str, size: int) -> tuple[Path, StoredFile]:
        data = name.encode() * size
        (tmp_path / name).write_bytes(data)
        return tmp_path / name, StoredFile(name, len(data), hashlib.sha256(data).hexdigest())

    return make


def wait_for(uploader: Uploader, count: int) -> list[Uploaded]:
    done: list[Uploaded] = []
    while len(done) < count:
        readable, _, _ = select.select([uploader.ready], [], [], LIMIT_S)
        assert readable, "nothing was uploaded"
        done += uploader.take()
    return done


def test_files_are_uploaded_in_order(hub: Any, destination: HubDestination, make_file: MakeFile) -> None:
    made = [make_file(f"{i}.safetensors", 1000) for i in range(5)]
    uploader = Uploader(destination)
    assert select.select([uploader.ready], [], [], 0)[0] == []
    for path, file in made:
        uploader.submit(path, file)
    assert uploader.waiting_bytes == sum(f.size_bytes for _, f in made)
    done = wait_for(uploader, 5)
    uploader.close()
    assert done == [Uploaded(file, None) for _, file in made]
    assert uploader.waiting_bytes == 0
    assert uploader.moved_bytes == sum(f.size_bytes for _, f in made)
    assert {f.sha256 for _, f in made} <= hub.objects.keys()


def test_an_error_is_handed_over_and_the_rest_goes_on(destination: HubDestination, make_file: MakeFile) -> None:
    path, good = make_file("good.safetensors", 10)
    bad = StoredFile("bad.safetensors", good.size_bytes, "0" * 64)
    uploader = Uploader(destination)
    uploader.submit(path, bad)
    uploader.submit(path, good)
    first, second = wait_for(uploader, 2)
    uploader.close()
    assert isinstance(first.error, ChecksumMismatch)
    assert second == Uploaded(good, None)
    assert uploader.moved_bytes == good.size_bytes


def test_a_bug_is_handed_over_too(
    destination: HubDestination, make_file: MakeFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_args: object) -> None:
        raise KeyError("oops")

    monkeypatch.setattr(HubDestination, "upload", fail)
    uploader = Uploader(destination)
    uploader.submit(*make_file("a.safetensors", 10))
    (done,) = wait_for(uploader, 1)
    uploader.close()
    assert isinstance(done.error, TaskFailed)
    assert "a.safetensors: KeyError" in str(done.error)


def test_a_stop_does_not_wait_for_the_network(
    hub: Any, fake: ModuleType, destination: HubDestination, make_file: MakeFile
) -> None:
    hub.write_faults.append(fake.WriteFault("stall", "/put/", "PUT", times=100, at=1000))
    uploader = Uploader(destination)
    uploader.submit(*make_file("a.safetensors", 1000))
    uploader.submit(*make_file("b.safetensors", 1000))
    end = time.monotonic() + LIMIT_S
    while not hub.write_faults[0].times < 100 and time.monotonic() < end:
        time.sleep(0.01)
    began = time.monotonic()
    uploader.close()
    assert time.monotonic() - began < 1.0
    assert hub.write_faults[0].times == 99  # the second file was not begun
    assert hub.objects == {}


def test_a_stop_ends_a_wait_between_attempts(
    hub: Any, fake: ModuleType, destination: HubDestination, make_file: MakeFile
) -> None:
    hub.write_faults.append(fake.WriteFault("status", "/put/", "PUT", times=100, headers={"Retry-After": "60"}))
    uploader = Uploader(destination)
    uploader.submit(*make_file("a.safetensors", 1000))
    end = time.monotonic() + LIMIT_S
    while not hub.write_faults[0].times < 100 and time.monotonic() < end:
        time.sleep(0.01)
    began = time.monotonic()
    uploader.close()
    assert time.monotonic() - began < 1.0


def test_a_stop_ends_a_transfer_of_the_xet_client(hub: Any, fake_base: ModuleType, make_file: MakeFile) -> None:
    pytest.importorskip("hf_xet")

    def uploads() -> set[threading.Thread]:
        return {t for t in threading.enumerate() if t.name == THREAD}

    before = uploads()
    destination = HubDestination("org/quantized", endpoint=hub.url, retry=QUICK, xet=True)
    destination.prepare()
    hub.faults.append(fake_base.Fault("status", "xet-write-token", times=100))
    uploader = Uploader(destination)
    uploader.submit(*make_file("a.safetensors", 1000))
    end = time.monotonic() + LIMIT_S
    while not hub.seen("xet-write-token") and time.monotonic() < end:
        time.sleep(0.01)
    began = time.monotonic()
    uploader.close()
    assert time.monotonic() - began < 1.0
    assert hub.seen("xet-write-token")
    end = began + 2.0  # left alone, it would go on asking for longer
    while (left := uploads() - before) and time.monotonic() < end:
        time.sleep(0.01)
    assert left == set()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_watched_work_that_is_killed_is_not_done() -> None:
    def work(_meter: Meter) -> None:
        raise SystemExit

    with pytest.raises(RuntimeError, match="interrupted"):
        run_watched(work, lambda _count: None)


def test_watched_work_hears_that_nobody_waits() -> None:
    heard: list[bool] = []

    def work(meter: Meter) -> None:
        try:
            while True:
                meter.add(1)
                time.sleep(0.01)
        except AbandonedError:
            heard.append(True)
            raise

    def stop(_count: int) -> None:
        raise KeyError

    stopped: list[bool] = []
    with pytest.raises(KeyError):
        run_watched(work, stop, lambda: stopped.append(True))
    end = time.monotonic() + LIMIT_S
    while not heard and time.monotonic() < end:
        time.sleep(0.01)
    assert (heard, stopped) == ([True], [True])
