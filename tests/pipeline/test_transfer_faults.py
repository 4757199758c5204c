"""Everything that can go wrong between a Hub and a run, with shards staged on disk and in range mode: the output is the
same to the byte, and nothing that was durable is fetched again."""

import errno
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import shardq
from shardq import Limits, Progress, make_recipe
from shardq.errors import ChecksumMismatch, DiskFull, HubTransfer, NonFiniteWeight, RecipeChanged
from shardq.run import quantize_to_folder
from shardq.sources.base import Source
from shardq.sources.hub import open_hub
from shardq.sources.hub_errors import RetryPolicy
from shardq.spans import Span, cut_spans

HERE = Path(__file__).parent
REPO = "org/model"
SHARDS = tuple(f"model-{n:05d}-of-00003.safetensors" for n in (1, 2, 3))
SPAN = 96 << 10  # so that small shards have many
QUICK = RetryPolicy(failures=4, first_wait_s=0.01, longest_wait_s=0.02, timeout_s=0.4)
LIMIT_S = 60.0  # for anything that takes a second on an idle machine
MODES = ("file", "stream")

Contents = Callable[[Path], dict[str, str]]


@dataclass(frozen=True)
class Usual:
    """Undisturbed runs."""

    contents: dict[str, str]
    sent: dict[str, dict[str, int]]  # mode -> shard -> bytes that the storage sent


@pytest.fixture(autouse=True)
def spans_are_small(monkeypatch: pytest.MonkeyPatch) -> None:
    shrink_spans(monkeypatch)


def shrink_spans(patch: pytest.MonkeyPatch) -> None:
    for name in ("shardq.spans.SPAN_BYTES", "shardq.plans.SPAN_BYTES", "shardq.plans.SLAB_BYTES"):
        patch.setattr(name, SPAN)


@pytest.fixture(scope="module")
def files(checkpoint: Path) -> dict[str, bytes]:
    """The repo's files."""
    return {p.name: p.read_bytes() for p in checkpoint.iterdir()}


@pytest.fixture(scope="module")
def usual(
    files: dict[str, bytes], fake_hub_module: ModuleType, tmp_path_factory: pytest.TempPathFactory, contents: Contents
) -> Usual:
    folder = tmp_path_factory.mktemp("usual")
    hub = fake_hub_module.FakeHub()
    hub.repos[REPO] = fake_hub_module.Repo()
    hub.repos[REPO].commit(files)
    sent = {}
    with pytest.MonkeyPatch.context() as patch:
        shrink_spans(patch)
        for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
            patch.delenv(name, raising=False)
        patch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder / "cache"))
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        source = open_hub(REPO, endpoint=hub.url, retry=QUICK)
        for mode in MODES:
            hub.log.clear()
            run(source, folder / mode, mode)
            sent[mode] = sent_bytes(hub)
    hub.close()
    assert contents(folder / "file") == contents(folder / "stream")
    return Usual(contents(folder / "file"), sent)


@pytest.fixture
def model(
    hub: Any, files: dict[str, bytes], fake_hub_module: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Any]:
    """A Hub with the repo; the client has a token, which must never reach the storage."""
    monkeypatch.setenv("HF_TOKEN", fake_hub_module.TOKEN)
    hub.repos[REPO] = fake_hub_module.Repo()
    hub.repos[REPO].commit(files)
    log = hub.log = Log()
    yield hub
    assert {s.authorization for s in log.all if "/resolve/" in s.path} == {f"Bearer {fake_hub_module.TOKEN}"}
    assert {s.authorization for s in log.all if s.origin == "storage"} <= {None}


class Log(list[Any]):
    """The log of a fake Hub; `clear` leaves `all` as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.all: list[Any] = []

    def append(self, seen: Any) -> None:
        self.all.append(seen)
        super().append(seen)


@pytest.fixture
def source(model: Any) -> Source:
    return open_hub(REPO, endpoint=model.url, retry=QUICK)


@pytest.fixture
def add_fault(model: Any, fake_hub_module: ModuleType) -> Callable[..., Any]:
    """add_fault(kind, path, ...): as the fake Hub's Fault."""

    def add(kind: str, path: str, **settings: Any) -> Any:
        model.faults.append(fake_hub_module.Fault(kind, path, **settings))
        return model.faults[-1]

    return add


def run(source: Source, out: Path, mode: str, report: Callable[[Progress], None] = lambda _: None) -> None:
    limits = Limits(parallel=1, stream=mode == "stream")
    quantize_to_folder(source, make_recipe("W4A16"), out, limits, False, report)


def shard_of(hub: Any, seen: Any) -> str | None:
    """The shard that a request to the storage is for."""
    sha256 = seen.path.removeprefix("/store/").partition("?")[0]
    return {hub.repos[REPO].sha256(data): name for name, data in first_tree(hub).items()}.get(sha256)


def first_tree(hub: Any) -> dict[str, bytes]:
    tree: dict[str, bytes] = next(iter(hub.repos[REPO].commits.values()))
    return tree


def requests(hub: Any, shard: str) -> list[Any]:
    """What the storage was asked for of a shard, but not the first request, which is for the header."""
    return [s for s in hub.seen("/store/") if shard_of(hub, s) == shard][1:]


def sent_bytes(hub: Any) -> dict[str, int]:
    """Of each shard, by the storage."""
    good = [s for s in hub.seen("/store/") if s.status in {200, 206}]
    return {shard: sum(s.sent_bytes for s in good if shard_of(hub, s) == shard) for shard in SHARDS}


def store(hub: Any, shard: str) -> str:
    """Where the storage has a shard."""
    return f"/store/{hub.repos[REPO].sha256(first_tree(hub)[shard])}"


def spans_of(checkpoint: Path, shard: str) -> tuple[Span, ...]:
    plan = shardq.plan(checkpoint)
    size_bytes = next(s.size_bytes for s in plan.checkpoint.shards if s.name == shard)
    return cut_spans(shard, size_bytes, [t for t in plan.tasks if t.shard == shard])


def check_nothing_loads(out: Path) -> None:
    assert {p.name for p in out.iterdir()} == {".shardq"}


def settings(hub: Any, home: Path, name: str, value: int) -> dict[str, str]:
    """The environment of a command line."""
    library = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home / "home"), "NO_PROXY": "127.0.0.1"}
    return {**os.environ, **library, name: str(value)}


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
    model: Any, source: Source, usual: Usual, tmp_path: Path, contents: Contents, add_fault: Callable[..., Any],
    name: str, mode: str,
) -> None:  # fmt: skip
    kind, path, settings = PASSING[name]
    fault = add_fault(kind, path, **settings)
    model.log.clear()
    run(source, tmp_path / "out", mode)
    assert fault.times == 0
    assert contents(tmp_path / "out") == usual.contents
    assert sent_bytes(model) == usual.sent[mode]
    if fault.status == 429:
        refused = next(i for i, s in enumerate(model.log) if s.status == 429)
        on_the_way = 2  # the other thread may have sent a request already
        assert all(s.at_s >= model.log[refused].at_s + 1 for s in model.log[refused + 1 + on_the_way :])


@pytest.mark.parametrize("uses", [1, 3])
def test_addresses_that_expire_all_the_time(
    model: Any, source: Source, usual: Usual, tmp_path: Path, contents: Contents, uses: int
) -> None:
    model.signature_uses = uses
    model.log.clear()
    run(source, tmp_path / "out", "stream")
    assert contents(tmp_path / "out") == usual.contents
    assert sent_bytes(model) == usual.sent["stream"]


def test_server_that_ignores_ranges_begins_the_file_again(
    model: Any, source: Source, usual: Usual, tmp_path: Path, contents: Contents, add_fault: Callable[..., Any]
) -> None:
    add_fault("drop", store(model, SHARDS[1]), at=30_000, skip=1)
    add_fault("ignore_range", store(model, SHARDS[1]), skip=1)  # of the requests that the first fault leaves alone
    run(source, tmp_path / "out", "file")
    assert [f.times for f in model.faults] == [0, 0]
    assert contents(tmp_path / "out") == usual.contents


def test_server_that_ignores_ranges_is_refused_in_range_mode(
    model: Any, source: Source, usual: Usual, tmp_path: Path, contents: Contents, add_fault: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("shardq.sources.hub_transfer._MAX_SKIPPED_BYTES", SPAN)
    add_fault("ignore_range", "/store/", skip=3, times=10**6)
    model.log.clear()
    with pytest.raises(HubTransfer, match=r"ignores byte ranges.*download the repo into a folder"):
        run(source, tmp_path / "out", "stream")
    check_nothing_loads(tmp_path / "out")
    assert max(len(requests(model, shard)) for shard in SHARDS) <= 4
    run(source, tmp_path / "out", "file")  # which needs no ranges
    assert contents(tmp_path / "out") == usual.contents


@pytest.mark.parametrize("mode", MODES)
def test_a_storm_of_429_is_sat_out_with_few_requests(
    model: Any, source: Source, usual: Usual, tmp_path: Path, contents: Contents, add_fault: Callable[..., Any],
    mode: str,
) -> None:  # fmt: skip
    storm = add_fault("status", "", status=429, headers={"Retry-After": "1"}, times=10**6, skip=10)
    model.log.clear()
    over = threading.Timer(1.5, lambda: setattr(storm, "times", 0))
    over.start()
    run(source, tmp_path / "out", mode)
    over.join()
    assert contents(tmp_path / "out") == usual.contents
    assert sent_bytes(model) == usual.sent[mode]
    assert 1 <= len([s for s in model.log if s.status == 429]) <= 6


@pytest.mark.parametrize("mode", MODES)
def test_a_storm_that_does_not_end_is_an_error_and_the_same_call_goes_on(
    model: Any, source: Source, usual: Usual, tmp_path: Path, contents: Contents, add_fault: Callable[..., Any],
    mode: str,
) -> None:  # fmt: skip
    add_fault("status", "/store/", status=503, times=10**6, skip=5 if mode == "file" else 15)
    with pytest.raises(HubTransfer, match="run the same command again later"):
        run(source, tmp_path / "out", mode)
    check_nothing_loads(tmp_path / "out")
    model.faults.clear()
    run(source, tmp_path / "out", mode)
    assert contents(tmp_path / "out") == usual.contents


# --- wrong bytes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["first", "middle", "last"])
@pytest.mark.parametrize("mode", MODES)
def test_a_flipped_bit_is_found_and_the_shard_comes_again(
    model: Any, source: Source, usual: Usual, checkpoint: Path, tmp_path: Path, contents: Contents,
    add_fault: Callable[..., Any], mode: str, place: str,
) -> None:  # fmt: skip
    shard = SHARDS[1]
    spans = spans_of(checkpoint, shard)
    assert len(spans) > 3
    number = {"first": 0, "middle": len(spans) // 2, "last": len(spans) - 1}[place]
    at = (spans[number].begin + spans[number].end) // 2
    fault = add_fault("corrupt", store(model, shard), at=at, skip=1 + (number if mode == "stream" else 0))
    model.log.clear()
    steps: list[Progress] = []
    run(source, tmp_path / "out", mode, steps.append)
    assert fault.times == 0
    assert contents(tmp_path / "out") == usual.contents
    size_bytes = spans[-1].end
    assert sent_bytes(model) == {**usual.sent[mode], shard: usual.sent[mode][shard] + size_bytes}
    assert steps[-1].done_bytes == steps[-1].total_bytes
    assert len(requests(model, shard)) == 2 * (len(spans) if mode == "stream" else 1)


@pytest.mark.parametrize("mode", MODES)
def test_a_shard_that_is_wrong_every_time_is_refused(
    model: Any, source: Source, usual: Usual, tmp_path: Path, contents: Contents, add_fault: Callable[..., Any],
    mode: str,
) -> None:  # fmt: skip
    add_fault("corrupt", store(model, SHARDS[0]), times=10**6, at=100_000, skip=1)
    with pytest.raises(ChecksumMismatch, match=rf"{SHARDS[0]}.*sha256.*2 times in a row"):
        run(source, tmp_path / "out", mode)
    check_nothing_loads(tmp_path / "out")
    model.faults.clear()
    run(source, tmp_path / "out", mode)
    assert contents(tmp_path / "out") == usual.contents


def test_a_weight_that_arrives_as_nan_is_not_the_checkpoints_fault(
    model: Any, source: Source, usual: Usual, checkpoint: Path, tmp_path: Path, contents: Contents,
    fake_hub_module: ModuleType, files: dict[str, bytes],
) -> None:  # fmt: skip
    """In range mode tasks see what has come before its hash is known."""
    lying = lying_repo(fake_hub_module, files, answers=1 + len(spans_of(checkpoint, SHARDS[0])))
    model.repos[REPO] = lying
    run(source, tmp_path / "out", "stream")
    assert lying.answers == 0
    assert contents(tmp_path / "out") == usual.contents


def test_a_weight_that_arrives_as_nan_every_time_is_a_wrong_hash(
    model: Any, source: Source, tmp_path: Path, fake_hub_module: Any, files: dict[str, bytes]
) -> None:
    model.repos[REPO] = lying_repo(fake_hub_module, files, answers=10**6)
    with pytest.raises(ChecksumMismatch):
        run(source, tmp_path / "out", "stream")
    check_nothing_loads(tmp_path / "out")


def test_a_weight_that_is_nan_is_the_checkpoints_fault(model: Any, tmp_path: Path, files: dict[str, bytes]) -> None:
    model.repos[REPO].commit({**files, SHARDS[0]: with_nans(files[SHARDS[0]])})
    with pytest.raises(NonFiniteWeight, match=r"layers\.0"):
        run(open_hub(REPO, endpoint=model.url, retry=QUICK), tmp_path / "out", "stream")
    check_nothing_loads(tmp_path / "out")


def with_nans(shard: bytes) -> bytes:
    """The same header, and after it only NaN in any dtype."""
    data_begin = 8 + int.from_bytes(shard[:8], "little")
    return shard[:data_begin] + b"\xff" * (len(shard) - data_begin)


def lying_repo(fake: Any, files: dict[str, bytes], answers: int) -> Any:
    """A repo whose storage gives NaN for the first shard in so many answers."""

    class LyingRepo(fake.Repo):  # type: ignore[misc,name-defined]
        def find(self, sha256: str) -> bytes | None:
            data: bytes | None = super().find(sha256)
            if data is files[SHARDS[0]] and self.answers > 0:
                self.answers -= 1
                return with_nans(files[SHARDS[0]])
            return data

    repo = LyingRepo()
    repo.answers = answers
    repo.commit(files)
    return repo


# --- interrupted, and run again -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("first", "second"), [(a, b) for a in MODES for b in MODES])
def test_killed_in_a_download_and_run_again(
    model: Any, usual: Usual, tmp_path: Path, contents: Contents, add_fault: Callable[..., Any],
    journal_lines: Callable[[Path, str], int], first: str, second: str,
) -> None:  # fmt: skip
    out, work = tmp_path / "out", tmp_path / "out" / ".shardq"
    slow = store(model, SHARDS[2])
    if first == "file":
        add_fault("trickle", slow, at=100_000, rate_bytes_s=100_000.0, skip=1)
    else:
        add_fault("trickle", slow, at=10_000, rate_bytes_s=2_000.0, skip=5)

    def part_bytes() -> int:
        return sum(p.stat().st_size for p in (work / "src").glob(f"{SHARDS[2]}.*.part"))

    def in_the_middle() -> bool:
        begun = part_bytes() > 150_000 if first == "file" else model.faults[0].times == 0
        return journal_lines(out, "sealed") == 2 and begun

    words = [sys.executable, "-P", str(HERE / "short_span_cli.py"), "quantize", REPO, "-o", str(out), "--parallel", "1"]
    process = subprocess.Popen(
        [*words, *(["--stream"] if first == "stream" else [])],
        env=settings(model, tmp_path, "SPAN_BYTES", SPAN), cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        deadline_s = time.monotonic() + LIMIT_S
        while not in_the_middle():
            assert process.poll() is None
            assert time.monotonic() < deadline_s, "nothing happens"
            time.sleep(0.005)
    finally:
        process.kill()
        process.wait()
    check_nothing_loads(out)
    here = part_bytes()
    model.faults.clear()
    model.log.clear()

    run(open_hub(REPO, endpoint=model.url, retry=QUICK), out, second)
    assert contents(out) == usual.contents
    assert [len(requests(model, shard)) for shard in SHARDS[:2]] == [0, 0]  # sealed: not even a byte
    again = requests(model, SHARDS[2])
    assert again[0].begin == (here if (first, second) == ("file", "file") else 0)
    assert sent_bytes(model)[SHARDS[2]] == usual.sent[second][SHARDS[2]] - again[0].begin


@pytest.mark.parametrize("second", MODES)
def test_a_staged_shard_is_not_asked_for_again(
    model: Any, source: Source, usual: Usual, tmp_path: Path, contents: Contents, second: str
) -> None:
    out = tmp_path / "out"

    def stop(step: Progress) -> None:
        if step.stage == "work":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(source, out, "file", stop)
    staged = {p.name for p in (out / ".shardq" / "src").glob("*.safetensors")}
    assert staged
    model.log.clear()
    run(source, out, second)
    assert contents(out) == usual.contents
    assert [shard for shard in staged if requests(model, shard)] == []


def test_a_streamed_shard_begins_again_and_a_sealed_one_does_not(
    model: Any, source: Source, usual: Usual, tmp_path: Path, contents: Contents
) -> None:
    """The hash of a streamed shard is taken over all of it, so nothing made of a part of it is kept."""
    out = tmp_path / "out"

    def stop(step: Progress) -> None:
        if step.done_files == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(source, out, "stream", stop)
    sealed = {p.name for p in (out / ".shardq" / "ready").iterdir()}
    assert len(sealed) == 1
    model.log.clear()
    run(source, out, "stream")
    assert contents(out) == usual.contents
    assert {shard for shard in SHARDS if not requests(model, shard)} == sealed
    for shard in set(SHARDS) - sealed:
        assert sent_bytes(model)[shard] == usual.sent["stream"][shard]


# --- full disks -----------------------------------------------------------------------------------------------------


def test_disk_full_in_a_download(
    model: Any, source: Source, usual: Usual, tmp_path: Path, contents: Contents, monkeypatch: pytest.MonkeyPatch
) -> None:
    from shardq.files.atomic import pwrite_all

    def refuse(fd: int, data: Any, offset: int) -> None:
        if offset + len(data) > 200_000:
            pwrite_all(fd, data[: max(0, 200_000 - offset)], offset)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        pwrite_all(fd, data, offset)

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr("shardq.sources.hub_sinks.pwrite_all", refuse)
        patch.setattr("shardq.sources.hub_sinks.PIECE_BYTES", 50_000)
        with pytest.raises(DiskFull, match=r"\.part: No space left"):
            run(source, out, "file")
    check_nothing_loads(out)
    parts = {p.name.partition(".safetensors")[0] + ".safetensors": p.stat().st_size
             for p in (out / ".shardq" / "src").glob("*.part")}  # fmt: skip
    assert 200_000 in parts.values()
    model.log.clear()
    run(source, out, "file")
    assert contents(out) == usual.contents
    assert {shard: requests(model, shard)[0].begin for shard in parts} == parts


@pytest.mark.parametrize("mode", MODES)
def test_disk_full_before_an_output_file(
    model: Any, source: Source, usual: Usual, tmp_path: Path, contents: Contents, monkeypatch: pytest.MonkeyPatch,
    journal_lines: Callable[[Path, str], int], mode: str,
) -> None:  # fmt: skip
    from shardq.files.atomic import preallocate

    begun: list[str] = []

    def refuse(fd: int, size_bytes: int, path: str) -> None:
        begun.append(path)
        if len(begun) == 3:
            raise DiskFull(f"cannot write {path}: No space left on device")
        preallocate(fd, size_bytes, path)

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr("shardq.staging.preallocate", refuse)
        with pytest.raises(DiskFull):
            run(source, out, mode)
    check_nothing_loads(out)
    sealed = {p.name for p in (out / ".shardq" / "ready").iterdir()}
    staged = {p.name for p in (out / ".shardq" / "src").glob("*.safetensors")}
    assert journal_lines(out, "sealed") == len(sealed)
    model.log.clear()
    run(source, out, mode)
    assert contents(out) == usual.contents
    assert {shard for shard in SHARDS if not requests(model, shard)} == sealed | staged


@pytest.mark.parametrize(
    ("mode", "code", "reason"), [("file", 33, "cannot write"), ("stream", 35, "a piece of memory")]
)
def test_limit_of_file_size(
    model: Any, source: Source, usual: Usual, tmp_path: Path, contents: Contents, mode: str, code: int, reason: str
) -> None:
    out = tmp_path / "out"
    words = [sys.executable, "-P", str(HERE / "limited_cli.py"), "quantize", REPO, "-o", str(out), "--parallel", "1"]
    done = subprocess.run(
        [*words, *(["--stream"] if mode == "stream" else [])], env=settings(model, tmp_path, "FILE_LIMIT_BYTES", 400_000),
        cwd=tmp_path, check=False, capture_output=True, text=True, timeout=LIMIT_S,
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    assert reason in done.stderr
    assert "Traceback" not in done.stderr
    check_nothing_loads(out)
    run(source, out, mode)
    assert contents(out) == usual.contents


# --- a repo that changes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_a_branch_that_moves_on_does_not_mix_revisions(
    model: Any, source: Source, usual: Usual, tmp_path: Path, contents: Contents, files: dict[str, bytes], mode: str
) -> None:
    def move(step: Progress) -> None:
        if step.done_files == 1 and len(model.repos[REPO].commits) == 1:
            model.repos[REPO].commit({**files, SHARDS[2]: with_nans(files[SHARDS[2]]), "config.json": b"{}"})

    run(source, tmp_path / "out", mode, move)
    assert len(model.repos[REPO].commits) == 2
    assert contents(tmp_path / "out") == usual.contents
    revisions = {match[1] for s in model.log if (match := re.search(r"/(?:resolve|tree)/([^/?]+)", s.path))}
    assert revisions == {source.commit}  # type: ignore[comparison-overlap]


@pytest.mark.parametrize("mode", MODES)
def test_a_run_is_not_finished_from_another_revision(
    model: Any, source: Source, usual: Usual, tmp_path: Path, contents: Contents, files: dict[str, bytes], mode: str
) -> None:
    out = tmp_path / "out"

    def stop(step: Progress) -> None:
        if step.done_files == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(source, out, mode, stop)
    model.repos[REPO].commit({**files, "generation_config.json": b"{}"})
    with pytest.raises(RecipeChanged, match=r"source\.commit"):
        run(open_hub(REPO, endpoint=model.url, retry=QUICK), out, mode)
    run(open_hub(REPO, source.commit, endpoint=model.url, retry=QUICK), out, mode)
    assert contents(out) == usual.contents
