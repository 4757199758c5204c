"""Jobs of several workers: who joins, who takes over, who publishes, and what is refused."""

import importlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import job_workers as processes
import pytest
from click.testing import CliRunner

from shardq import Limits
from shardq.cli.group import commands
from shardq.errors import (
    BadOption,
    DiskFull,
    JobUnfinished,
    OutputOccupied,
    RecipeChanged,
    SourceUnreadable,
    Terminated,
)
from shardq.lane import Lane
from shardq.nodes import calls, ending, maker, records
from shardq.nodes.job import Job

ONE = Limits(parallel=1)
FILES = 3
Contents = Callable[[Path], dict[str, str]]


class Cut(BaseException):
    """The end of a worker that nothing catches."""


@pytest.fixture
def job(checkpoint: Path, tmp_path: Path) -> Job:
    return begin(checkpoint, tmp_path)


def begin(source: Path, tmp_path: Path, **settings: Any) -> Job:
    return calls.begin_job(tmp_path / "job", source, stale_s=1, **settings)


def work(job: Job, wait: bool = True, **settings: Any) -> Any:
    return calls.work(job, limits=ONE, wait=wait, **settings)


def cut_at(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, calls: int, before: bool) -> None:
    """Die at the call of this number, before or after it is done."""
    plain, left = getattr(owner, name), [calls]

    def cut(*arguments: Any) -> Any:
        left[0] -= 1
        if left[0] == 0 and before:
            raise Cut
        value = plain(*arguments)
        if left[0] == 0:
            raise Cut
        return value

    monkeypatch.setattr(owner, name, cut)


# --- what comes out --------------------------------------------------------------------------------------------------


def test_alone(job: Job, undisturbed: dict[str, str], contents: Contents) -> None:
    worked = work(job)
    assert (len(worked.files), worked.complete) == (FILES, True)
    assert contents(job.folder.output) == undisturbed
    assert worked.result.errors is not None
    again = work(job)
    assert (again.files, again.complete, again.result) == ((), True, None)
    assert calls.finalize(job, limits=ONE).already_done


def test_several_at_once(job: Job, undisturbed: dict[str, str], contents: Contents) -> None:
    """Threads of one process: each has a staging folder of its own."""
    worked: list[Any] = []
    threads = [threading.Thread(target=lambda n=n: worked.append(work(job, worker=f"{n}/3"))) for n in range(3)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert sorted(f for w in worked for f in w.files) == sorted(job.record.files)
    assert [w.complete for w in worked] == [True] * 3
    assert sum(w.result is not None for w in worked) == 1
    assert contents(job.folder.output) == undisturbed


def test_scratch_on_another_file_system(
    job: Job, undisturbed: dict[str, str], contents: Contents, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files are copied into the job then, and hashed on the way."""
    plain = os.link

    def link(source: Path, target: Path) -> None:
        if "scratch" in Path(source).parts:
            raise OSError(18, "Invalid cross-device link")
        plain(source, target)

    monkeypatch.setattr(os, "link", link)
    scratch = tmp_path / "scratch"
    work(job, scratch=scratch)
    assert contents(job.folder.output) == undisturbed
    assert not [p for p in scratch.rglob("*") if p.is_file()]


def test_folder_without_links(
    job: Job, undisturbed: dict[str, str], contents: Contents, monkeypatch: pytest.MonkeyPatch
) -> None:
    def link(source: Path, target: Path) -> None:
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    work(job)
    assert contents(job.folder.output) == undisturbed


# --- crashes ---------------------------------------------------------------------------------------------------------

MOMENTS: dict[str, tuple[Any, str, int, bool]] = {
    "file sealed": (Lane, "seal", 2, False),
    "file stored": (maker, "write_record", 2, True),
    "file recorded": (maker, "write_record", 2, False),
    "before the last record": (maker, "write_record", FILES, True),
    "all files recorded": (maker, "write_record", FILES, False),
    "before the journal": (ending, "write_atomic", 1, True),
    "journal of the output": (ending, "write_atomic", 1, False),
    "first file moved": (importlib.import_module("shardq.publish"), "_move", 1, False),
    "before config.json": (importlib.import_module("shardq.publish"), "_move", FILES + 7, True),
    "published": (ending, "quantize_all", 1, False),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_others_finish_what_a_dead_worker_began(
    checkpoint: Path, job: Job, undisturbed: dict[str, str], contents: Contents, monkeypatch: pytest.MonkeyPatch,
    moment: str,
) -> None:  # fmt: skip
    stored: list[str] = []
    with monkeypatch.context() as patch:
        cut_at(patch, *MOMENTS[moment])
        with pytest.raises(Cut):
            work(job)
    assert not job.is_over()
    plain = records.put_file

    def count(path: Path, target: Path, *rest: Any) -> bool:
        new = plain(path, target, *rest)
        stored.extend([target.name] * new)
        return new

    monkeypatch.setattr(records, "put_file", count)
    there = {p.name for p in job.folder.ready.glob("*.safetensors")} | {
        p.name for p in job.folder.output.glob("*.safetensors")
    }
    worked = work(calls.begin_job(job.folder.path, checkpoint))
    assert worked.complete
    assert contents(job.folder.output) == undisturbed
    assert not there.intersection(stored)
    assert len(stored) == FILES - len(there)


def test_lost_file_is_made_again(
    job: Job, undisturbed: dict[str, str], contents: Contents, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        cut_at(patch, ending, "write_atomic", 1, True)
        with pytest.raises(Cut):
            work(job)
    (job.folder.ready / job.record.files[1]).unlink()
    work(job)
    assert contents(job.folder.output) == undisturbed


def test_only_one_of_several_publishes(
    checkpoint: Path, tmp_path: Path, job: Job, undisturbed: dict[str, str], contents: Contents,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Two processes at a job of which all files are made, the moves so slow that both are there."""
    with monkeypatch.context() as patch:
        cut_at(patch, ending, "write_atomic", 1, True)
        with pytest.raises(Cut):
            work(job)
    with processes.Workers(job.folder.path, [str(checkpoint)], 0.05, loud=True) as workers:
        both = [workers.start("--json") for _ in range(2)]
        results = [json.loads(p.communicate(timeout=processes.LIMIT_S)[0]) for p in both]
    assert [r["complete"] for r in results] == [True, True]
    assert sum(r["result"] is not None for r in results) == 1
    assert contents(job.folder.output) == undisturbed


def test_stopped_worker_gives_back_claims_and_work(
    checkpoint: Path, tmp_path: Path, undisturbed: dict[str, str], contents: Contents
) -> None:
    """Another goes on at once, with what was made of a file already."""
    path = tmp_path / "job"
    with processes.Workers(path, [str(checkpoint)], 0.2, stale_s=1000) as workers:
        process = workers.start()
        deadline_s = time.monotonic() + processes.LIMIT_S
        while not any('"event":"task"' in p.read_text() for p in path.glob("work/*/.shardq/journal.jsonl")):
            assert time.monotonic() < deadline_s
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        _, messages = process.communicate(timeout=processes.LIMIT_S)
    assert process.returncode == Terminated.exit_code, messages
    job = calls.begin_job(path, checkpoint)
    reused: list[int] = []  # bytes
    worked = calls.work(job, limits=ONE, report=lambda step: reused.append(step.resumed_bytes))
    assert len(worked.files) == FILES
    assert max(reused) > 0
    assert contents(job.folder.output) == undisturbed


# --- refused ---------------------------------------------------------------------------------------------------------


def test_another_recipe_is_refused(job: Job, checkpoint: Path) -> None:
    with pytest.raises(RecipeChanged, match=r"these differ: .*recipe\.scheme"):
        calls.begin_job(job.folder.path, checkpoint, "W8A16")
    assert calls.begin_job(job.folder.path, checkpoint).record == job.record


def test_another_version_is_refused(job: Job, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shardq.plans.VERSION", "9.9")
    with pytest.raises(RecipeChanged, match=r"version \(was '.*', now '9.9'\)"):
        calls.begin_job(job.folder.path, checkpoint)


def test_another_destination_is_refused(job: Job, checkpoint: Path) -> None:
    text = json.loads((job.folder.path / "job.json").read_text())
    (job.folder.path / "job.json").write_text(json.dumps({**text, "push_to": "me/name"}))
    with pytest.raises(RecipeChanged, match="push_to"):
        calls.begin_job(job.folder.path, checkpoint)


def test_source_that_changed_is_refused(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    source = make_checkpoint(layers=2)
    job = begin(source, tmp_path)
    shard = source / job.record.files[1]
    os.utime(shard, ns=(0, shard.stat().st_mtime_ns + 1))
    with pytest.raises(RecipeChanged, match=f"{shard.name} has another time"):
        begin(source, tmp_path)
    with pytest.raises(RecipeChanged, match=f"{shard.name} has another time"):
        work(job)
    assert job.left() == [shard.name]


def test_folder_that_holds_something_else(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "job").mkdir()
    (tmp_path / "job" / "letter.txt").touch()
    with pytest.raises(OutputOccupied, match=r"letter\.txt"):
        begin(checkpoint, tmp_path)
    with pytest.raises(OutputOccupied, match="source folder"):
        calls.begin_job(checkpoint, checkpoint)


def test_damaged_job(job: Job, checkpoint: Path) -> None:
    (job.folder.path / "job.json").write_text("{")
    with pytest.raises(SourceUnreadable, match="is no record of a job"):
        calls.begin_job(job.folder.path, checkpoint)


def test_disk_too_small_for_the_output(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: Mock(free=1000))
    with pytest.raises(DiskFull, match="for the output"):
        begin(checkpoint, tmp_path)


@pytest.mark.parametrize("limits", [Limits(delete_source=True), Limits(keep_local=True)])
def test_what_one_worker_may_not_do_to_others(job: Job, limits: Limits) -> None:
    with pytest.raises(BadOption, match="other workers read"):
        calls.work(job, limits=limits)
    with pytest.raises(BadOption, match="other workers read"):
        calls.finalize(job, limits=limits)


# --- command line ----------------------------------------------------------------------------------------------------


def run(*words: str) -> Any:
    return CliRunner().invoke(commands, words)


def test_command_line_joins_without_words(checkpoint: Path, tmp_path: Path, contents: Contents) -> None:
    job = str(tmp_path / "job")
    rules = tmp_path / "rules.json"
    rules.write_text('{"re:.*down_proj": {"bits": 8}}')
    words = [
        "--scheme",
        "W4A16@gptq",
        "--asym",
        "--group-size",
        "-1",
        "--layer-config",
        str(rules),
        "--ignore",
        "lm_head",
    ]
    shardq_words = ["quantize", str(checkpoint), *words, "-o", str(tmp_path / "alone"), "--parallel", "1", "-q"]
    assert run(*shardq_words).exit_code == 0
    begun = run(
        "worker", "--job", job, str(checkpoint), *words, "--parallel", "1", "--no-wait", "-q", "--worker", "0/9"
    )
    assert begun.exit_code == 0, begun.output
    record = json.loads((tmp_path / "job" / "job.json").read_text())
    assert "--worker" not in record["words"]
    joined = run("worker", "--job", job, "--json")
    assert json.loads(joined.stdout)["complete"]
    assert contents(tmp_path / "job" / "output") == contents(tmp_path / "alone")


def test_finalize_says_what_is_missing(checkpoint: Path, tmp_path: Path, undisturbed: Any, contents: Contents) -> None:
    path = tmp_path / "job"
    job = calls.begin_job(path, checkpoint, words=[str(checkpoint)])
    found = run("finalize", "--job", str(path))
    assert found.exit_code == JobUnfinished.exit_code
    assert f"3 of 3 files are missing, the first {job.record.files[0]}" in found.stderr
    with pytest.MonkeyPatch.context() as patch:
        cut_at(patch, ending, "write_atomic", 1, True)
        with pytest.raises(Cut):
            work(job)
    done = run("finalize", "--job", str(path), "--json")
    assert json.loads(done.stdout)["result"]["output"] == str(path / "output")
    assert contents(path / "output") == undisturbed


def test_finalize_without_a_job(tmp_path: Path) -> None:
    found = run("finalize", "--job", str(tmp_path / "none"))
    assert (found.exit_code, "holds no job" in found.stderr) == (3, True)
    assert run("worker", "--job", str(tmp_path / "none")).exit_code == 3
    assert run("worker", "--job", str(tmp_path / "none"), "--finalize").exit_code == 2  # which is no option


def test_one_output_a_job(checkpoint: Path, tmp_path: Path) -> None:
    found = run("worker", "--job", str(tmp_path / "job"), str(checkpoint), "--scheme", "W4A16", "--scheme", "MXFP4")
    assert (found.exit_code, "2 outputs" in found.stderr) == (3, True)


def test_ray_that_is_not_installed(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    found = run("worker", "--job", str(tmp_path / "job"), str(checkpoint), "--executor", "ray")
    assert (found.exit_code, "pip install 'shardq[ray]'" in found.stderr) == (4, True)
