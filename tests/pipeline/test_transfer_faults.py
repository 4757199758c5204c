"""Everything that can go wrong between a Hub and a run, with shards staged on disk and in range mode: the output is the
same to the byte, and nothing that was durable is fetched again."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import shardq
from shardq import Progress
from shardq.errors import ChecksumMismatch, HubTransfer, NonFiniteWeight
from shardq.onepass import OnePass
from shardq.sources.base import Source
from shardq.spans import Span, cut_all

SHARDS = tuple(f"model-{n:05d}-of-00003.safetensors" for n in (1, 2, 3))
MODES = ("file", "stream")

Contents = Callable[[Path], dict[str, str]]


def spans_of(checkpoint: Path, shard: str) -> tuple[Span, ...]:
    return cut_all(OnePass((shardq.plan(checkpoint),)))[shard]


def check_nothing_loads(out: Path) -> None:
    assert {p.name for p in out.iterdir()} == {".shardq"}


# --- faults that pass -----------------------------------------------------------------------------------------------

PASSING: dict[str, tuple[str, str, dict[str, Any]]] = {  # kind, where, how
    "connection reset in a body": ("drop", "/store/", {"at": 30_000, "skip": 3, "times": 2}),
    "body closed too early": ("truncate", "/store/", {"at": 30_000, "skip": 3, "times": 2}),
    "reset before storage answers": ("reset_now", "/store/", {"skip": 3, "times": 3}),
    "reset before the Hub answers": ("reset_now", "/resolve/", {"skip": 4, "times": 3}),
    "reset while headers are read": ("reset_now", "/store/", {"times": 2}),
    "too many requests, Retry-After": (
        "status", "/resolve/", {"status": 429, "headers": {"Retry-After": "1"}, "skip": 4},
    ),
    "too many requests, RateLimit": (
        "status", "/resolve/", {"status": 429, "headers": {"RateLimit": '"resolvers";r=0;t=1'}, "skip": 4},
    ),
    "storage unavailable": ("status", "/store/", {"status": 503, "skip": 3, "times": 3}),
    "storage has an error": ("status", "/store/", {"status": 500, "skip": 3, "times": 3}),
    "the Hub has an error": ("status", "/resolve/", {"status": 500, "skip": 4, "times": 3}),
    "address expired": ("expire", "/store/", {"skip": 3, "times": 2}),
    "nothing comes any more": ("stall", "/store/", {"at": 30_000, "skip": 3}),
    "no answer comes": ("hang", "/store/", {"skip": 3}),
}  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", PASSING)
def test_a_passing_fault_costs_no_byte(
    model: Any, source: Source, usual: Any, tmp_path: Path, contents: Contents, name: str, mode: str
) -> None:
    kind, path, settings = PASSING[name]
    fault = model.add_fault(kind, path, **settings)
    model.forget()
    model.run(source, tmp_path / "out", mode)
    assert fault.times == 0
    assert contents(tmp_path / "out") == usual.contents
    assert model.sent() == usual.sent[mode]
    if fault.status == 429:
        refused = next(i for i, s in enumerate(model.hub.log) if s.status == 429)
        on_the_way = 2  # the other thread may have sent a request already
        assert all(s.at_s >= model.hub.log[refused].at_s + 1 for s in model.hub.log[refused + 1 + on_the_way :])


@pytest.mark.parametrize("uses", [1, 3])
def test_addresses_that_expire_all_the_time(
    model: Any, source: Source, usual: Any, tmp_path: Path, contents: Contents, uses: int
) -> None:
    model.hub.signature_uses = uses
    model.forget()
    model.run(source, tmp_path / "out", "stream")
    assert contents(tmp_path / "out") == usual.contents
    assert model.sent() == usual.sent["stream"]


def test_server_that_ignores_ranges_begins_the_file_again(
    model: Any, source: Source, usual: Any, tmp_path: Path, contents: Contents
) -> None:
    model.add_fault("drop", model.store(SHARDS[1]), at=30_000, skip=1)
    model.add_fault("ignore_range", model.store(SHARDS[1]), skip=1)  # of the requests that the first fault leaves alone
    model.run(source, tmp_path / "out", "file")
    assert [f.times for f in model.hub.faults] == [0, 0]
    assert contents(tmp_path / "out") == usual.contents


def test_server_that_ignores_ranges_is_refused_in_range_mode(
    model: Any, source: Source, usual: Any, tmp_path: Path, contents: Contents, short_spans: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("shardq.sources.hub_transfer._MAX_SKIPPED_BYTES", short_spans)
    model.add_fault("ignore_range", "/store/", skip=3, times=10**6)
    model.forget()
    with pytest.raises(HubTransfer, match=r"ignores byte ranges.*download the repo into a folder"):
        model.run(source, tmp_path / "out", "stream")
    check_nothing_loads(tmp_path / "out")
    assert max(len(model.asked(shard)) for shard in SHARDS) <= 4
    model.run(source, tmp_path / "out", "file")  # which needs no ranges
    assert contents(tmp_path / "out") == usual.contents


@pytest.mark.parametrize("mode", MODES)
def test_a_storm_of_429_is_sat_out_with_few_requests(
    model: Any, source: Source, usual: Any, tmp_path: Path, contents: Contents, mode: str
) -> None:
    storm = model.add_fault("status", "", status=429, headers={"Retry-After": "1"}, times=10**6, skip=10)
    model.forget()
    over = threading.Timer(1.5, lambda: setattr(storm, "times", 0))
    over.start()
    model.run(source, tmp_path / "out", mode)
    over.join()
    assert contents(tmp_path / "out") == usual.contents
    assert model.sent() == usual.sent[mode]
    assert 1 <= len([s for s in model.hub.log if s.status == 429]) <= 6


@pytest.mark.parametrize("mode", MODES)
def test_a_storm_that_does_not_end_is_an_error_and_the_same_call_goes_on(
    model: Any, source: Source, usual: Any, tmp_path: Path, contents: Contents, mode: str
) -> None:
    model.add_fault("status", "/store/", status=503, times=10**6, skip=5 if mode == "file" else 15)
    with pytest.raises(HubTransfer, match="run the same command again later"):
        model.run(source, tmp_path / "out", mode)
    check_nothing_loads(tmp_path / "out")
    model.hub.faults.clear()
    model.run(source, tmp_path / "out", mode)
    assert contents(tmp_path / "out") == usual.contents


# --- wrong bytes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["first", "middle", "last"])
@pytest.mark.parametrize("mode", MODES)
def test_a_flipped_bit_is_found_and_the_shard_comes_again(
    model: Any, source: Source, usual: Any, checkpoint: Path, tmp_path: Path, contents: Contents,
    mode: str, place: str,
) -> None:  # fmt: skip
    shard = SHARDS[1]
    spans = spans_of(checkpoint, shard)
    assert len(spans) > 3
    number = {"first": 0, "middle": len(spans) // 2, "last": len(spans) - 1}[place]
    at = (spans[number].begin + spans[number].end) // 2
    fault = model.add_fault("corrupt", model.store(shard), at=at, skip=1 + (number if mode == "stream" else 0))
    model.forget()
    steps: list[Progress] = []
    model.run(source, tmp_path / "out", mode, steps.append)
    assert fault.times == 0
    assert contents(tmp_path / "out") == usual.contents
    size_bytes = spans[-1].end
    assert model.sent() == {**usual.sent[mode], shard: usual.sent[mode][shard] + size_bytes}
    assert steps[-1].done_bytes == steps[-1].total_bytes
    assert len(model.asked(shard)) == 2 * (len(spans) if mode == "stream" else 1)


@pytest.mark.parametrize(("mode", "then"), [(a, b) for a in MODES for b in MODES])
def test_a_shard_that_is_wrong_every_time_is_refused(
    model: Any, source: Source, usual: Any, tmp_path: Path, contents: Contents, mode: str, then: str
) -> None:
    """And what was made of it is not taken up by the next run."""
    model.add_fault("corrupt", model.store(SHARDS[0]), times=10**6, at=100_000, skip=1)
    with pytest.raises(ChecksumMismatch, match=rf"{SHARDS[0]}.*sha256.*2 times in a row"):
        model.run(source, tmp_path / "out", mode)
    check_nothing_loads(tmp_path / "out")
    model.hub.faults.clear()
    model.run(source, tmp_path / "out", then)
    assert contents(tmp_path / "out") == usual.contents


def test_a_weight_that_arrives_as_nan_is_not_the_checkpoints_fault(
    model: Any, source: Source, usual: Any, checkpoint: Path, tmp_path: Path, contents: Contents
) -> None:
    """In range mode tasks see what has come before its hash is known."""
    liar = Liar(model, answers=1 + len(spans_of(checkpoint, SHARDS[0])))
    model.run(source, tmp_path / "out", "stream")
    assert liar.answers == 0
    assert contents(tmp_path / "out") == usual.contents


def test_a_weight_that_arrives_as_nan_every_time_is_a_wrong_hash(model: Any, source: Source, tmp_path: Path) -> None:
    Liar(model, answers=10**6)
    with pytest.raises(ChecksumMismatch):
        model.run(source, tmp_path / "out", "stream")
    check_nothing_loads(tmp_path / "out")


def test_a_weight_that_is_nan_is_the_checkpoints_fault(model: Any, tmp_path: Path) -> None:
    files = {**model.files, SHARDS[0]: with_nans(model.files[SHARDS[0]])}
    model.hub.repos[model.repo].commit(files)
    with pytest.raises(NonFiniteWeight, match=r"layers\.0"):
        model.run(model.open(), tmp_path / "out", "stream")
    check_nothing_loads(tmp_path / "out")


def with_nans(shard: bytes) -> bytes:
    """The same header, and after it only NaN in any dtype."""
    data_begin = 8 + int.from_bytes(shard[:8], "little")
    return shard[:data_begin] + b"\xff" * (len(shard) - data_begin)


class Liar:
    """Makes the storage give NaN for the first shard, in so many answers."""

    def __init__(self, model: Any, answers: int) -> None:
        self.answers = answers
        self._find = model.hub.repos[model.repo].find
        self._shard: bytes = model.files[SHARDS[0]]
        model.hub.repos[model.repo].find = self.find

    def find(self, sha256: str) -> bytes | None:
        data: bytes | None = self._find(sha256)
        if data == self._shard and self.answers > 0:
            self.answers -= 1
            return with_nans(self._shard)
        return data
