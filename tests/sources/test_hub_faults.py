"""Every fault of a Hub or its storage, for whole files and for parts of one, with a client that is logged in."""

import hashlib
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from shardq.errors import ChecksumMismatch, CorruptShard, HubTransfer
from shardq.sources.hub import ignore_bytes, open_hub
from shardq.sources.hub_errors import Gate, RetryPolicy, server_wait_s

pytestmark = pytest.mark.usefixtures("token")
SHARD = "model-00002-of-00003.safetensors"
REPO = "acme/demo"
BEGIN, SPAN = 300_000, 600_000

Get = Callable[[Any, list[int]], bytes]


def get_whole(source: Any, folder: Path, steps: list[int]) -> bytes:
    sha256 = source.fetch(SHARD, folder / "shard", steps.append)
    data = (folder / "shard").read_bytes()
    assert sha256 == hashlib.sha256(data).hexdigest()
    assert [p.name for p in folder.glob("shard*")] == ["shard"]
    return data


def get_part(source: Any, folder: Path, steps: list[int]) -> bytes:
    out = bytearray(SPAN)
    reader = source.open_file(SHARD, steps.append)
    reader.read_into(BEGIN, memoryview(out))
    reader.close()
    return bytes(out)


@pytest.fixture(params=["fetch", "read_into"])
def get(request: pytest.FixtureRequest, tmp_path: Path) -> Get:
    how = get_whole if request.param == "fetch" else get_part
    return lambda source, steps: how(source, tmp_path, steps)


@pytest.fixture
def expected(get: Get, request: pytest.FixtureRequest, contents: dict[str, bytes]) -> bytes:
    whole = contents[SHARD]
    return whole if request.node.callspec.params["get"] == "fetch" else whole[BEGIN : BEGIN + SPAN]


# name: faults as (kind, path, settings), requests to the storage, requests to resolve
TABLE: dict[str, tuple[list[tuple[str, str, dict[str, Any]]], int, int]] = {
    "none": ([], 1, 1),
    "reset in the body": ([("drop", "/store/", {"at": 100_001})], 2, 1),
    "reset again and again": ([("drop", "/store/", {"at": 50_000, "times": 9})], 10, 1),
    "closed early": ([("truncate", "/store/", {"at": 100_001})], 2, 1),
    "reset before the head": ([("reset_now", "/store/", {})], 2, 1),
    "reset before the redirect": ([("reset_now", "/resolve/", {})], 1, 2),
    "429": ([("status", "/store/", {"status": 429, "headers": {"Retry-After": "0"}})], 2, 1),
    "503 of the storage": ([("status", "/store/", {"status": 503})], 2, 1),
    "500 of the Hub": ([("status", "/resolve/", {"status": 500})], 1, 2),
    "403 at once": ([("expire", "/store/", {})], 2, 2),
    "403 when it goes on": ([("drop", "/store/", {"at": 1000}), ("expire", "/store/", {})], 3, 2),
    "404 of the storage": ([("status", "/store/", {"status": 404})], 2, 2),
    "stall": ([("stall", "/store/", {"at": 200_000})], 2, 1),
    "no answer": ([("hang", "/store/", {})], 2, 1),
    "trickle": ([("trickle", "/store/", {"at": 200_000})], 2, 1),
    "range ignored when it goes on": ([("drop", "/store/", {"at": 1000}), ("ignore_range", "/store/", {})], 2, 1),
    "wrong range": ([("drop", "/store/", {"at": 1000}), ("wrong_range", "/store/", {})], 3, 1),
}


@pytest.mark.parametrize("name", TABLE)
def test_fault_is_survived(
    name: str, get: Get, expected: bytes, hub: Any, repo: Any, fake_hub_module: ModuleType, quick: RetryPolicy
) -> None:
    faults, stored, resolved = TABLE[name]
    patient = replace(quick, timeout_s=0.5, stall_s=0.6, least_rate_bytes_s=1e6)
    source = open_hub(REPO, endpoint=hub.url, retry=patient)
    hub.faults = [fake_hub_module.Fault(kind, path, **settings) for kind, path, settings in faults]
    steps: list[int] = []
    assert get(source, steps) == expected
    assert sum(steps) == len(expected)
    assert all(f.times == 0 for f in hub.faults)
    assert (len(hub.seen("/store/")), len(hub.seen("/resolve/"))) == (stored, resolved)


def test_no_byte_is_asked_for_twice(
    get: Get, expected: bytes, source: Any, hub: Any, fake_hub_module: ModuleType
) -> None:
    hub.faults = [fake_hub_module.Fault("drop", "/store/", at=100_000, times=5)]
    get(source, [])
    begins = [s.begin for s in hub.seen("/store/")]
    assert begins == [begins[0] + 100_000 * i for i in range(6)]
    assert sum(s.sent_bytes for s in hub.seen("/store/")) == len(expected)


def test_signature_that_lasts_for_one_request(
    get: Get, expected: bytes, source: Any, hub: Any, fake_hub_module: ModuleType
) -> None:
    hub.signature_uses = 1
    # every other fault is spent on a request whose signature is refused anyway
    hub.faults = [fake_hub_module.Fault("drop", "/store/", at=100_000, times=5)]
    assert get(source, []) == expected
    assert [s.status for s in hub.seen("/store/")][1:] == [403, 206] * 3


def test_lasting_faults_end_as_transfer_errors(get: Get, source: Any, hub: Any, fake_hub_module: ModuleType) -> None:
    fault = fake_hub_module.Fault
    for lasting, reason in (
        (fault("status", "/store/", times=99), "HTTP 503"),
        (fault("status", "/store/", status=403, times=99), "HTTP 403 from storage"),
        (fault("drop", "/store/", at=0, times=99), "Connection|closed"),
        (fault("wrong_range", "/store/", times=99), "Content-Range"),
    ):
        hub.faults = [fault("drop", "/store/", at=1000), lasting]
        with pytest.raises(HubTransfer, match=rf"{SHARD}: gave up after 6 failures in a row, the last: .*({reason})"):
            get(source, [])


def test_moved_repo_is_followed(get: Get, expected: bytes, hub: Any, repo: Any, quick: RetryPolicy) -> None:
    hub.moved["old/name"] = REPO
    source = open_hub("old/name", endpoint=hub.url, retry=quick)
    assert get(source, []) == expected
    on_hub = [s for s in hub.log if s.origin == "hub"]
    assert {s.status for s in on_hub} == {200, 302, 307}
    assert all(s.authorization for s in on_hub if "/resolve/" in s.path)


def test_one_failing_file_does_not_disturb_the_others(
    source: Any, hub: Any, fake_hub_module: ModuleType, contents: dict[str, bytes], tmp_path: Path
) -> None:
    names = [n for n in contents if n.endswith(".safetensors")]
    failing = hashlib.sha256(contents[names[0]]).hexdigest()
    hub.faults = [fake_hub_module.Fault("reset_now", f"/store/{failing}", times=99)]

    def fetch(name: str) -> str | None:
        try:
            source.fetch(name, tmp_path / name, ignore_bytes)
        except HubTransfer:
            return None
        return name

    with ThreadPoolExecutor(3) as pool:
        assert [*pool.map(fetch, names)] == [None, *names[1:]]
    assert all((tmp_path / n).read_bytes() == contents[n] for n in names[1:])


def test_server_that_is_down_is_a_transfer_error(get: Get, source: Any, hub: Any) -> None:
    hub.close()
    with pytest.raises(HubTransfer, match=r"gave up.*(cannot connect|closed before an answer)"):
        get(source, [])


def test_flipped_bit_is_fetched_again_once(
    source: Any, hub: Any, fake_hub_module: ModuleType, contents: dict[str, bytes], tmp_path: Path
) -> None:
    hub.faults = [fake_hub_module.Fault("corrupt", "/store/", at=5000)]
    steps: list[int] = []
    assert get_whole(source, tmp_path, steps) == contents[SHARD]
    assert sum(steps) == len(contents[SHARD])
    assert len(hub.seen("/store/")) == 2


def test_bit_that_stays_flipped_is_set_aside(
    source: Any, hub: Any, fake_hub_module: ModuleType, contents: dict[str, bytes], tmp_path: Path
) -> None:
    hub.faults = [fake_hub_module.Fault("corrupt", "/store/", at=5000, times=2)]
    with pytest.raises(ChecksumMismatch, match=rf"{SHARD}: sha256 is \w+, the Hub promises \w+, .*kept as shard\.bad"):
        source.fetch(SHARD, tmp_path / "shard", ignore_bytes)
    assert [p.name for p in tmp_path.glob("shard*")] == ["shard.bad"]
    assert (tmp_path / "shard.bad").stat().st_size == len(contents[SHARD])
    assert get_whole(source, tmp_path, []) == contents[SHARD]
    hub.faults = [fake_hub_module.Fault("corrupt", "/store/", at=7, times=9)]
    with pytest.raises(ChecksumMismatch, match=r"tokenizer\.json"):
        source.read("tokenizer.json", 0, len(contents["tokenizer.json"]))


@pytest.mark.parametrize("path", ["/api/models/acme/demo$", "/resolve/", "/store/"])
@pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 503, 504])
def test_passing_server_errors_are_retried(
    hub: Any, repo: Any, fake_hub_module: ModuleType, quick: RetryPolicy, tmp_path: Path, path: str, status: int
) -> None:
    hub.faults = [fake_hub_module.Fault("status", path, status=status, times=2)]
    source = open_hub(REPO, endpoint=hub.url, retry=quick)
    source.fetch(SHARD, tmp_path / "shard", ignore_bytes)
    assert hub.faults[0].times == 0


def test_lasting_error_of_the_api_is_a_transfer_error(
    hub: Any, repo: Any, fake_hub_module: ModuleType, quick: RetryPolicy
) -> None:
    hub.faults = [fake_hub_module.Fault("status", "/api/models", times=99)]
    with pytest.raises(HubTransfer, match="acme/demo, the repo: gave up after 6 failures in a row"):
        open_hub(REPO, endpoint=hub.url, retry=quick)


# --- parts of a file --------------------------------------------------------------------------------------------


def test_spans_cost_one_request_each_and_one_to_resolve(source: Any, hub: Any, contents: dict[str, bytes]) -> None:
    steps: list[int] = []
    reader = source.open_file(SHARD, steps.append)
    hub.log.clear()
    for begin in range(0, 1000, 100):
        out = bytearray(50)
        reader.read_into(begin, memoryview(out))
        assert out == contents[SHARD][begin : begin + 50]
    reader.read_into(5, memoryview(bytearray()))
    assert len(hub.log) == 11
    assert sum(steps) == 500
    hub.signature_s = 0.0  # what was signed has expired
    with pytest.raises(HubTransfer, match="403 from storage"):
        reader.read_into(0, memoryview(bytearray(4)))
    hub.signature_s = None
    reader.read_into(0, memoryview(bytearray(4)))


def test_readers_of_many_threads_share_a_link(source: Any, contents: dict[str, bytes]) -> None:
    def read(begin: int) -> bool:
        reader = source.open_file(SHARD, ignore_bytes)
        out = bytearray(10_000)
        for at in range(begin, begin + 100_000, 10_000):
            reader.read_into(at, memoryview(out))
            if out != contents[SHARD][at : at + 10_000]:
                return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, range(0, 80_000, 10_000)))


def test_server_that_ignores_ranges_is_never_read_whole(
    hub: Any, repo: Any, fake_hub_module: ModuleType, quick: RetryPolicy
) -> None:
    data = bytes(64 << 20)
    repo.commit({"big.safetensors": data})
    source = open_hub(REPO, endpoint=hub.url, retry=quick)
    hub.faults = [fake_hub_module.Fault("ignore_range", "/store/", times=99)]
    out = bytearray(100)
    reader = source.open_file("big.safetensors", ignore_bytes)
    with pytest.raises(
        HubTransfer, match=r"ignores byte ranges and would send all 67108864 bytes .* download the repo"
    ):
        reader.read_into(32 << 20, memoryview(out))
    assert len(hub.seen("/store/")) == 1
    assert source.read("big.safetensors", 0, 1000) == bytes(1000)  # the beginning is cheap to have
    assert source.read("big.safetensors", 5000, 6000) == bytes(1000)
    time.sleep(0.05)
    assert all((s.sent_bytes or 0) < len(data) // 2 for s in hub.seen("/store/"))
    whole = bytearray(len(data))
    reader.read_into(0, memoryview(whole))
    assert whole == data


def test_part_beyond_the_end_is_refused(source: Any, contents: dict[str, bytes]) -> None:
    size = len(contents[SHARD])
    with pytest.raises(CorruptShard, match=f"has {size} bytes, but bytes {size - 4} to {size + 4} are asked for"):
        source.open_file(SHARD, ignore_bytes).read_into(size - 4, memoryview(bytearray(8)))
    with pytest.raises(CorruptShard):
        source.read(SHARD, size, size + 1)


# --- waits that the server asks for -----------------------------------------------------------------------------


def test_429_pauses_all_transfers_of_the_source(
    source: Any, hub: Any, fake_hub_module: ModuleType, contents: dict[str, bytes]
) -> None:
    hub.faults = [fake_hub_module.Fault("status", "/store/", status=429, headers={"Retry-After": "1"})]
    begun = threading.Event()

    def late() -> None:
        begun.wait()
        time.sleep(0.2)
        source.read(SHARD, 0, 8)

    with ThreadPoolExecutor(6) as pool:
        waiting = [pool.submit(late) for _ in range(5)]
        first = pool.submit(source.read, SHARD, 0, 8)
        begun.set()
        for task in [*waiting, first]:
            task.result()
    refused = next(s for s in hub.seen("/store/") if s.status == 429)
    later = [s for s in hub.log if s.at_s > refused.at_s]
    assert len(later) >= 6
    assert min(s.at_s for s in later) - refused.at_s >= 0.9


def test_gate_keeps_the_longest_wait_and_can_be_left() -> None:
    gate = Gate()
    gate.hold(60.0)
    gate.hold(0.001)
    ticks = 0

    def stop() -> None:
        nonlocal ticks
        ticks += 1
        if ticks == 3:
            raise KeyError("stop")

    begun = time.monotonic()
    with pytest.raises(KeyError):
        gate.wait(stop)
    assert 0.4 < time.monotonic() - begun < 10.0


def test_server_wait_is_kept_or_refused(source: Any, hub: Any, fake_hub_module: ModuleType) -> None:
    hub.faults = [fake_hub_module.Fault("status", "/store/", status=429, headers={"Retry-After": "86400"})]
    with pytest.raises(HubTransfer, match="asks to wait 86400 s"):
        source.read(SHARD, 0, 8)
    assert server_wait_s({"Retry-After": "7"}) == 7.0
    assert server_wait_s({"ratelimit": '"api";r=0;t=55', "Retry-After": "7"}) == 55.0
    assert server_wait_s({"RateLimit": '"api";r=3;t=55'}) is None
    assert server_wait_s({"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}) == 0.0
    assert server_wait_s({"Retry-After": "soon"}) is None
    policy = RetryPolicy()
    assert policy.wait_s(1, 12.0) == 12.0
    assert 0.25 <= policy.wait_s(1, None) <= 0.5
    assert 4.0 <= policy.wait_s(20, None) <= 8.0
