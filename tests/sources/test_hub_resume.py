"""Downloads that are stopped, killed or find something on the disk: nothing that has arrived is asked for again."""

import errno
import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from shardq.errors import ChecksumMismatch, CorruptShard, DiskFull, HubTransfer, SourceUnreadable
from shardq.sources.base import SourceFile
from shardq.sources.demo import open_demo
from shardq.sources.hub import ignore_bytes, open_hub
from shardq.sources.hub_errors import RetryPolicy
from shardq.sources.local import open_folder

pytestmark = pytest.mark.usefixtures("token")
SHARD = "model-00002-of-00003.safetensors"
REPO = "acme/demo"
LIMIT_S = 30.0  # for anything that takes milliseconds on an idle machine


class Stop(Exception):
    pass


@pytest.fixture
def data(contents: dict[str, bytes]) -> bytes:
    return contents[SHARD]


def part_name(data: bytes) -> str:
    return f"shard.{hashlib.sha256(data).hexdigest()[:12]}.part"


FETCH = """
import sys
from pathlib import Path
from shardq.sources.hub import open_hub
open_hub(sys.argv[1], endpoint=sys.argv[2]).fetch(sys.argv[3], Path(sys.argv[4]), lambda n: None)
"""


def test_killed_fetch_goes_on_at_the_byte(
    source: Any, hub: Any, fake_hub_module: ModuleType, data: bytes, tmp_path: Path
) -> None:
    hub.faults = [fake_hub_module.Fault("stall", "/store/", at=500_000)]
    keep = {k: v for k, v in os.environ.items() if k in {"PATH", "PYTHONPATH", "HF_TOKEN"}}
    arguments = [REPO, hub.url, SHARD, str(tmp_path / "shard")]
    client = subprocess.Popen([sys.executable, "-P", "-c", FETCH, *arguments], env={**keep, "HF_HOME": str(tmp_path)})
    part = tmp_path / part_name(data)
    ends_at = time.monotonic() + LIMIT_S
    while not (part.exists() and part.stat().st_size == 500_000) and time.monotonic() < ends_at:
        time.sleep(0.01)
    client.send_signal(signal.SIGKILL)
    client.wait()
    assert part.read_bytes() == data[:500_000]
    hub.log.clear()
    steps: list[int] = []
    assert source.fetch(SHARD, tmp_path / "shard", steps.append) == hashlib.sha256(data).hexdigest()
    assert (tmp_path / "shard").read_bytes() == data
    assert not part.exists()
    assert [s.begin for s in hub.seen("/store/")] == [500_000]
    assert sum(steps) == len(data)


def test_failed_fetch_is_continued_by_the_next_call(
    source: Any, hub: Any, fake_hub_module: ModuleType, data: bytes, tmp_path: Path
) -> None:
    fault = fake_hub_module.Fault
    hub.faults = [fault("drop", "/store/", at=123_456), fault("status", "/store/", times=99)]
    with pytest.raises(HubTransfer):
        source.fetch(SHARD, tmp_path / "shard", ignore_bytes)
    assert [p.name for p in tmp_path.glob("shard*")] == [part_name(data)]
    hub.faults, before = [], len(hub.seen("/store/"))
    source.fetch(SHARD, tmp_path / "shard", ignore_bytes)
    assert [s.begin for s in hub.seen("/store/")[before:]] == [123_456]
    assert (tmp_path / "shard").read_bytes() == data


def test_failure_before_the_first_byte_leaves_nothing(
    source: Any, hub: Any, fake_hub_module: ModuleType, tmp_path: Path
) -> None:
    hub.faults = [fake_hub_module.Fault("status", "/store/", times=99)]
    with pytest.raises(HubTransfer):
        source.fetch(SHARD, tmp_path / "shard", ignore_bytes)
    assert not list(tmp_path.glob("shard*"))


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


# what is found on the disk -> the first bytes of the requests that follow
FOUND: dict[str, tuple[Callable[[bytes], bytes], list[int]]] = {
    "a beginning": (lambda d: d[:1000], [1000]),
    "nothing": (lambda d: b"", [0]),
    "everything": (lambda d: d, []),
    "a damaged beginning": (lambda d: flipped(d[:1000], 500), [1000, 0]),
    "zeros after a power cut": (lambda d: d[:1000] + bytes(5000), [6000, 0]),
    "everything, damaged": (lambda d: flipped(d, 7), [0]),
    "too much": (lambda d: d + b"x", [0]),
}


@pytest.mark.parametrize("name", FOUND)
def test_what_is_found_is_verified(name: str, source: Any, hub: Any, data: bytes, tmp_path: Path) -> None:
    make, begins = FOUND[name]
    (tmp_path / part_name(data)).write_bytes(make(data))
    steps: list[int] = []
    source.fetch(SHARD, tmp_path / "shard", steps.append)
    assert (tmp_path / "shard").read_bytes() == data
    assert [p.name for p in tmp_path.glob("shard*")] == ["shard"]
    assert [s.begin for s in hub.seen("/store/")] == begins
    assert sum(steps) == len(data)


def test_damaged_part_is_not_held_against_the_hub(
    source: Any, hub: Any, fake_hub_module: ModuleType, data: bytes, tmp_path: Path
) -> None:
    (tmp_path / part_name(data)).write_bytes(flipped(data, 7))
    hub.faults = [fake_hub_module.Fault("corrupt", "/store/", at=5000)]
    source.fetch(SHARD, tmp_path / "shard", ignore_bytes)
    (tmp_path / part_name(data)).write_bytes(flipped(data, 7))
    hub.faults = [fake_hub_module.Fault("corrupt", "/store/", at=5000, times=99)]
    with pytest.raises(ChecksumMismatch):
        source.fetch(SHARD, tmp_path / "shard", ignore_bytes)
    assert hub.faults[0].times == 97


def test_part_of_other_content_is_never_continued(
    hub: Any, repo: Any, quick: RetryPolicy, contents: dict[str, bytes], tmp_path: Path
) -> None:
    other = bytes(len(contents[SHARD]))
    (tmp_path / part_name(contents[SHARD])).write_bytes(contents[SHARD][:1000])
    (tmp_path / "shard.bad").write_bytes(b"x")
    strangers = ["shard.part", "shard.abc.part", "shard2.aaaaaaaaaaaa.part", "other.bad"]
    for name in strangers:
        (tmp_path / name).write_bytes(b"x")
    repo.commit({**contents, SHARD: other})
    hub.log.clear()
    open_hub(REPO, endpoint=hub.url, retry=quick).fetch(SHARD, tmp_path / "shard", ignore_bytes)
    assert (tmp_path / "shard").read_bytes() == other
    assert [s.begin for s in hub.seen("/store/")] == [0]
    assert {p.name for p in tmp_path.iterdir() if p.is_file()} == {"shard", *strangers}


def test_small_files_of_two_commits_have_different_parts(
    hub: Any, repo: Any, quick: RetryPolicy, contents: dict[str, bytes], tmp_path: Path, fake_hub_module: ModuleType
) -> None:
    config = contents["config.json"]
    fault = fake_hub_module.Fault
    hub.faults = [fault("drop", "/config.json", at=100), fault("status", "/config.json", times=99)]
    with pytest.raises(HubTransfer):
        open_hub(REPO, endpoint=hub.url, retry=quick).fetch("config.json", tmp_path / "c", ignore_bytes)
    assert len(list(tmp_path.glob("c.*.part"))) == 1
    hub.faults = []
    changed = config.replace(b"0.02", b"0.03")
    repo.commit({**contents, "config.json": changed, "one more": b""})
    open_hub(REPO, endpoint=hub.url, retry=quick).fetch("config.json", tmp_path / "c", ignore_bytes)
    assert (tmp_path / "c").read_bytes() == changed
    assert not list(tmp_path.glob("c.*"))


# --- stops ------------------------------------------------------------------------------------------------------

WAITS: dict[str, tuple[str, dict[str, Any]]] = {
    "for an answer": ("hang", {}),
    "for a byte": ("stall", {"at": 300_000}),
    "for slow bytes": ("trickle", {"at": 300_000}),
    "between attempts": ("status", {"times": 99}),
    "as the server asks": ("status", {"status": 429, "headers": {"Retry-After": "60"}}),
    "for nothing": ("none", {}),
}


@pytest.mark.parametrize("name", WAITS)
@pytest.mark.parametrize("how", ["fetch", "read_into"])
def test_stop_is_heeded_within_a_second(
    name: str, how: str, hub: Any, repo: Any, fake_hub_module: ModuleType, data: bytes, tmp_path: Path
) -> None:
    kind, settings = WAITS[name]
    source = open_hub(REPO, endpoint=hub.url, retry=RetryPolicy(first_wait_s=30.0, longest_wait_s=30.0))
    hub.faults = [fake_hub_module.Fault(kind, "/store/", **settings)] if kind != "none" else []
    stop_at = time.monotonic() + 1.2
    called_at = [time.monotonic()]

    def stop(count: int) -> None:
        called_at.append(time.monotonic())
        if called_at[-1] >= stop_at or kind == "none":
            raise Stop

    def get() -> None:
        if how == "fetch":
            source.fetch(SHARD, tmp_path / "shard", stop)
        else:
            source.open_file(SHARD, stop).read_into(0, memoryview(bytearray(len(data))))

    with pytest.raises(Stop):
        get()
    assert time.monotonic() - stop_at < 1.0
    if kind != "none":
        assert max(b - a for a, b in pairwise(called_at)) < 0.6
    parts = list(tmp_path.glob("shard*"))
    if how == "fetch" and "at" in settings:
        assert [p.name for p in parts] == [part_name(data)]
        kept = parts[0].read_bytes()
        assert len(kept) >= 300_000
        assert kept == data[: len(kept)]


def test_an_os_error_of_the_caller_is_not_taken_for_a_broken_link(source: Any, hub: Any, tmp_path: Path) -> None:
    def fail(count: int) -> None:
        raise BrokenPipeError("the terminal is gone")

    with pytest.raises(BrokenPipeError):
        source.fetch(SHARD, tmp_path / "shard", fail)
    assert len(hub.seen("/store/")) == 1


# --- the other sources ------------------------------------------------------------------------------------------


def test_readers_of_folder_and_demo_fill_exactly(contents: dict[str, bytes], tmp_path: Path) -> None:
    (tmp_path / SHARD).write_bytes(contents[SHARD])
    for source in (open_folder(str(tmp_path)), open_demo()):
        steps: list[int] = []
        reader = source.open_file(SHARD, steps.append)
        out = bytearray(4096)
        reader.read_into(777, memoryview(out))
        assert out == contents[SHARD][777 : 777 + 4096]
        assert sum(steps) == 4096
        with pytest.raises(CorruptShard):
            reader.read_into(len(contents[SHARD]) - 1, memoryview(bytearray(2)))
        reader.close()
        with pytest.raises(SourceUnreadable):
            source.open_file("nothing", steps.append)


def test_reader_uses_the_cache(source: Any, hub: Any, data: bytes, client_settings: Path) -> None:
    from huggingface_hub import hf_hub_download

    hf_hub_download(REPO, SHARD, revision=source.commit, endpoint=hub.url, cache_dir=client_settings)
    hub.log.clear()
    out = bytearray(100)
    reader = source.open_file(SHARD, ignore_bytes)
    reader.read_into(50, memoryview(out))
    reader.close()
    assert out == data[50:150]
    assert not hub.log


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux reserves blocks without making the file longer")
def test_full_disk_is_told_before_the_first_byte(source: Any, hub: Any, data: bytes, tmp_path: Path) -> None:
    (tmp_path / part_name(data)).write_bytes(data[:1000])
    listing = (SourceFile(SHARD, 1 << 60, hashlib.sha256(data).hexdigest()),)
    with pytest.raises(DiskFull, match=r"cannot write .*shard\.\w+\.part"):
        replace(source, listing=listing).fetch(SHARD, tmp_path / "shard", ignore_bytes)
    assert not hub.seen("/store/")
    assert (tmp_path / part_name(data)).read_bytes() == data[:1000]


def test_disk_that_fills_up_on_the_way_keeps_what_is_there(
    source: Any, hub: Any, data: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shardq.sources.hub_sinks.PIECE_BYTES", 64 << 10)
    write, left = os.pwrite, [5]

    def pwrite(fd: int, piece: memoryview, offset: int) -> int:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(fd, piece, offset)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", pwrite)
        with pytest.raises(DiskFull):
            source.fetch(SHARD, tmp_path / "shard", ignore_bytes)
    kept = (tmp_path / part_name(data)).stat().st_size
    assert kept > 0
    source.fetch(SHARD, tmp_path / "shard", ignore_bytes)
    assert (tmp_path / "shard").read_bytes() == data
    assert [s.begin for s in hub.seen("/store/")][-1] == kept
