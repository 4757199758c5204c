"""Jobs whose workers upload to a repo on a Hub (on loopback): each file is sent once, and one commit shows all."""

import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

import shardq
from shardq import Limits
from shardq.errors import RecipeChanged
from shardq.nodes import calls, ending
from shardq.nodes.folder import JobFolder
from shardq.nodes.job import Job
from shardq.nodes.working import Worked, make_file

REPO = "me/quantized"
LAYERS = 6
ONE = Limits(parallel=1)


class Cut(BaseException):
    """The end of a worker that nothing catches."""


@pytest.fixture
def source(make_checkpoint: Callable[..., Path], host_model: Callable[[Path], str]) -> str:
    return host_model(make_checkpoint(layers=LAYERS))


@pytest.fixture
def expected(source: str, tmp_path: Path) -> dict[str, bytes]:
    shardq.quantize(source, output_dir=tmp_path / "alone", limits=ONE)
    return {p.relative_to(tmp_path / "alone").as_posix(): p.read_bytes() for p in (tmp_path / "alone").rglob("*.*")}


def begin(source: str, tmp_path: Path) -> Job:
    return calls.begin_job(tmp_path / "job", source, push_to=REPO, stale_s=1)


def work(job: Job, stream: bool) -> Worked:
    return calls.work(job, limits=Limits(parallel=1, stream=stream))


def pushed(hub: Any) -> dict[str, bytes]:
    return {name: data for name, data in hub.files(REPO).items() if name != ".gitattributes"}


def puts(hub: Any) -> Counter[str]:
    return Counter(s.path.removeprefix("/put/").partition("?")[0] for s in hub.seen("/put/", "PUT"))


def test_workers_upload_and_one_commits(push_hub: Any, source: str, expected: dict[str, bytes], tmp_path: Path) -> None:
    """Each has a job of its own in memory, as processes have."""
    worked: list[Any] = []
    jobs = [begin(source, tmp_path) for _ in range(3)]
    threads = [threading.Thread(target=lambda n=n, j=j: worked.append(work(j, n == 1))) for n, j in enumerate(jobs)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(push_hub.commits) == 1
    assert pushed(push_hub) == expected
    assert set(puts(push_hub).values()) == {1}
    (result,) = (w.result for w in worked if w.result)
    assert (result.pushed_to, result.pushed_commit) == (REPO, push_hub.commits[0].oid)
    assert JobFolder(tmp_path / "job").completed() == {"commit": push_hub.commits[0].oid}
    assert not (tmp_path / "job" / "output").exists()
    assert not list((tmp_path / "job").rglob("*.safetensors"))


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
def test_worker_that_dies_at_the_commit(
    push_hub: Any, source: str, expected: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    before: bool,
) -> None:  # fmt: skip
    plain = ending.quantize_all

    def cut(*arguments: Any) -> Any:
        if not before:
            plain(*arguments)
        raise Cut

    with monkeypatch.context() as patch:
        patch.setattr(ending, "quantize_all", cut)
        with pytest.raises(Cut):
            calls.work(begin(source, tmp_path), limits=ONE)
    assert len(push_hub.commits) == (0 if before else 1)
    sent = puts(push_hub)
    push_hub.log.clear()
    calls.work(begin(source, tmp_path), limits=ONE)
    assert len(push_hub.commits) == 1
    assert pushed(push_hub) == expected
    assert not sent & puts(push_hub)


def test_storage_that_has_forgotten_a_file(
    push_hub: Any, source: str, expected: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Uploads that no commit names may be dropped: whoever publishes makes such files again."""
    with monkeypatch.context() as patch:
        patch.setattr(ending, "quantize_all", Mock(side_effect=Cut))
        with pytest.raises(Cut):
            calls.work(begin(source, tmp_path), limits=ONE)
    sent = puts(push_hub)
    push_hub.collect_garbage()
    calls.work(begin(source, tmp_path), limits=ONE)
    assert pushed(push_hub) == expected
    assert len(push_hub.commits) == 1
    assert [puts(push_hub)[content] for content in sent] == [2] * LAYERS


def test_another_repo_is_another_job(push_hub: Any, source: str, tmp_path: Path) -> None:
    begin(source, tmp_path)
    with pytest.raises(RecipeChanged, match="push_to"):
        calls.begin_job(tmp_path / "job", source, push_to="me/other")


def test_who_joins_asks_for_no_headers(push_hub: Any, source: str, tmp_path: Path) -> None:
    """The Hub counts requests; the first worker's are enough."""
    first = begin(source, tmp_path)
    assert len(push_hub.seen("/resolve/")) > LAYERS
    push_hub.log.clear()
    joined = begin(source, tmp_path)
    assert joined.plan == first.plan
    assert not [s for s in push_hub.seen("/resolve/") if s.path.endswith(".safetensors")]


@pytest.mark.parametrize("stream", [False, True], ids=["staged", "streamed"])
def test_scales_that_files_share(
    push_hub: Any, write_moe: Callable[..., Path], host_model: Callable[[Path], str], tmp_path: Path,
    short_spans: int, stream: bool,
) -> None:  # fmt: skip
    """Every file needs magnitudes of shards that no file made here begins with."""
    folder = write_moe(tmp_path / "source" / "model", lambda place, _: 1 + place % 5)
    source = host_model(folder)
    shardq.quantize(source, "NVFP4A16", output_dir=tmp_path / "alone", limits=ONE)
    job = calls.begin_job(tmp_path / "job", source, "NVFP4A16")
    for file in reversed(job.record.files[1:]):  # one by one, as if each were on a machine of its own
        make_file(job.post(), file, Limits(parallel=1, stream=stream))
    work(job, stream)
    for path in (tmp_path / "alone").iterdir():
        assert (tmp_path / "job" / "output" / path.name).read_bytes() == path.read_bytes(), path.name


def test_branch_that_moves(push_hub: Any, source: str, expected: dict[str, bytes], tmp_path: Path) -> None:
    """A job stays with the commit that it was begun with."""
    first = begin(source, tmp_path)
    push_hub.repos[source].commit({**push_hub.files(source), "README.md": b"new"})
    joined = begin(source, tmp_path)
    assert joined.record == first.record
    work(joined, False)
    assert pushed(push_hub) == expected
