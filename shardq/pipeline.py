"""Runs a plan: bring source shards, hand tasks to workers, seal finished files, free source shards, upload.

Order of events for an output file: all its tasks -> fsync and hash in `part` -> rename to `ready` -> fsync of the
folder -> journal line, fsync -> only then is its source shard freed -> upload, journal line, fsync -> only then is the
output file freed. A crash loses at most unjournaled tasks.
"""

import logging
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Final

from shardq.admission import Admission, ShardCost
from shardq.checkpoint import Shard
from shardq.destinations.base import StoredFile
from shardq.errors import ShardqError
from shardq.executors.base import Executor, Job, Outcome
from shardq.fetcher import Fetched
from shardq.journal import Journal
from shardq.limits import Limits
from shardq.needs import record_bytes, shard_costs
from shardq.plans import OutputFile, Plan
from shardq.progress import Progress, Report, Stage
from shardq.signals import StopFlag
from shardq.sources.base import Source
from shardq.space import check_space
from shardq.staging import Progressed, Staging
from shardq.streamer import Passed, Piece
from shardq.supply import Supply
from shardq.tasks import Checked, Done, Sealed, SealTask, Streamed, Task
from shardq.uploader import Uploaded, Uploader

logger = logging.getLogger(__name__)
POLL_S: Final = 1.0  # longest wait without looking at the stop flag
SEAL_COST_BYTES: Final = 1 << 20
Work = Task | Checked | Streamed | SealTask


@dataclass(frozen=True, slots=True)
class Finished:
    """What a completed run leaves for publishing."""

    done: Mapping[int, Done]
    sealed: Mapping[str, tuple[str, int]]  # file -> sha256, size


class Pipeline:
    """One run of one plan in one staging folder."""

    def __init__(
        self,
        plan: Plan,
        source: Source,
        staging: Staging,
        journal: Journal,
        before: Progressed,
        limits: Limits,
        slots: int,
        report: Report,
        uploader: Uploader | None,
        destination: str | None,
    ) -> None:
        self._plan, self._staging, self._journal = plan, staging, journal
        self._limits, self._report = limits, report
        self._uploader, self._destination = uploader, destination
        self._files: Mapping[str, OutputFile] = {f.name: f for f in plan.files}
        self._shards: Mapping[str, Shard] = {s.name: s for s in plan.checkpoint.shards}
        self._tasks: dict[str, list[Task]] = {f.name: [] for f in plan.files}
        for task in plan.tasks:
            self._tasks[task.file].append(task)
        self._done: dict[int, Done] = dict(before.tasks)
        self._sealed: dict[str, tuple[str, int]] = dict(before.sealed)
        self._uploaded: set[str] = set(before.uploaded)
        self._left = {f: len(ts) for f, ts in self._tasks.items()}  # tasks of this run still to finish, by file
        self._todo: deque[Work] = deque()
        self._begun: set[str] = set()  # output files that have their size and header
        self._passed: set[str] = set()  # streamed shards whose hash was right
        self._wrong: set[str] = set()  # streamed shards whose hash was wrong, to be done again
        self._suspect: dict[str, ShardqError] = {}  # errors of tasks of streamed shards that have not passed yet
        self._error: ShardqError | None = None
        self._supply = Supply(source, staging, slots, plan.largest_span_bytes)
        self._source = source
        self._admission: Admission
        self._resumed_bytes = sum(t.source_bytes for f in self._sealed for t in self._tasks[f])
        self._done_bytes = self._resumed_bytes
        self._total_bytes = plan.source_bytes  # a sum over all tensors, told at every step

    def run(self, executor: Executor, stop: StopFlag) -> Finished:
        """Do everything that is left. Raises Interrupted, Terminated, or the first error of a task or transfer."""
        self._tell("start", "")
        self._admission = self._account()
        self._resume()
        while not self._finished() or executor.unfinished():
            if stop.signal or self._error:
                self._drain(executor, stop)
            self._step(executor, stop)
        return Finished(self._done, self._sealed)

    def close(self) -> None:
        """Stop all transfers; only after the workers, which may read what a transfer has brought."""
        self._supply.close()
        if self._uploader:
            self._uploader.close()

    # --- loop ------------------------------------------------------------------------------------------------------

    def _step(self, executor: Executor, stop: StopFlag) -> None:
        """Begin what may begin, wait for something to happen, and take it in."""
        self._admit()
        self._take()
        while self._todo and executor.room() > 0:
            work = self._todo.popleft()
            if not isinstance(work, SealTask):
                self._begin(self._files[_task_of(work).file])
            executor.submit(self._job(work))
        also = [stop.ready, *self._supply.ready, *([self._uploader.ready] if self._uploader else [])]
        for outcome in executor.wait(POLL_S, also):
            self._collect(outcome)
        self._take()
        if self._supply.ready:
            self._tell("fetch", "")

    def _take(self) -> None:
        """Everything that transfers have brought."""
        for news in self._supply.take():
            match news:
                case Fetched():
                    self._on_fetched(news)
                case Piece():
                    self._todo.extend(Streamed(t, news.slot.path, news.origin) for t in news.span.tasks)
                case Passed():
                    self._on_passed(news)
        for uploaded in self._uploader.take() if self._uploader else ():
            self._on_uploaded(uploaded)

    def _finished(self) -> bool:
        return len(self._sealed) == len(self._files) and (not self._uploader or len(self._uploaded) == len(self._files))

    def _drain(self, executor: Executor, stop: StopFlag) -> None:
        """Let running tasks finish, keep what they did, and raise."""
        executor.cancel_queued()
        while executor.unfinished():
            for outcome in executor.wait(POLL_S):
                self._collect(outcome)
        if self._error:
            raise self._error
        percent = 100 * self._done_bytes // max(1, self._total_bytes)
        stop.heed(f"{percent} % is done and kept in {self._staging.work}: run the same command again to resume")

    def _job(self, work: Work) -> Job:
        if isinstance(work, SealTask):
            number = len(self._plan.tasks) + list(self._files).index(work.file)
            return Job(number, work, SEAL_COST_BYTES, f"sealing {work.file}")
        task = _task_of(work)
        return Job(task.id, work, task.cost_bytes, f"{task.tensor} in {task.shard}")

    # --- tasks -----------------------------------------------------------------------------------------------------

    def _collect(self, outcome: Outcome) -> None:
        match outcome.result:
            case None:
                assert outcome.error is not None
                self._on_failed(outcome.job.work, outcome.error)
            case Sealed() as sealed:
                self._on_sealed(sealed)
            case Done() as done:
                self._on_done(done)
            case other:
                raise TypeError(f"a worker answered {other!r}")

    def _on_failed(self, work: object, error: ShardqError) -> None:
        """The run ends, unless the task may have read wrong bytes: then the shard's hash decides."""
        if isinstance(work, Streamed) and work.task.shard not in self._passed:
            self._suspect.setdefault(work.task.shard, error)
            self._count_off(work.task)
        else:
            self._error = self._error or error

    def _on_done(self, done: Done) -> None:
        task = self._plan.tasks[done.id]
        if done.reused:
            self._resumed_bytes += task.source_bytes
        elif not self._supply.is_streamed(self._shards[task.shard]):
            self._journal_task(done)
        self._done[done.id] = done
        self._done_bytes += task.source_bytes
        self._count_off(task)
        self._tell("work", task.shard)

    def _count_off(self, task: Task) -> None:
        self._supply.settle(task)
        self._left[task.file] -= 1
        self._complete(task.file)

    def _complete(self, name: str) -> None:
        """Seal a file when all its tasks are done and its source is known to have been right."""
        if self._left[name] > 0:
            return
        file = self._files[name]
        shard = self._shards[file.shard]
        if self._supply.is_streamed(shard):
            if shard.name in self._wrong:
                self._do_again(shard, file)
                return
            if shard.name not in self._passed:
                return
            if shard.name in self._suspect:
                self._error = self._error or self._suspect[shard.name]
                return
            for task in self._tasks[name]:  # only now: what was made of wrong bytes must never be found in the journal
                self._journal_task(self._done[task.id])
        self._begin(file)
        self._todo.appendleft(SealTask(name, file.size_bytes))

    def _do_again(self, shard: Shard, file: OutputFile) -> None:
        """Forget what was made of a shard that came wrong."""
        self._wrong.discard(shard.name)
        self._suspect.pop(shard.name, None)
        for task in self._tasks[file.name]:
            if self._done.pop(task.id, None):
                self._done_bytes -= task.source_bytes
        self._left[file.name] = len(self._tasks[file.name])
        self._error = self._error or self._supply.again(shard, self._tasks[file.name])

    def _journal_task(self, done: Done) -> None:
        self._journal.append(
            {"event": "task", "id": done.id, "checksum": done.checksum, "sse": done.squared_error,
             "ssw": done.squared_weight, "max": done.max_error},
            durable=False,
        )  # fmt: skip

    def _begin(self, file: OutputFile) -> None:
        """Make an output file; only now, so that disk is taken as it is freed."""
        if file.name not in self._begun:
            self._staging.begin(file)
            self._begun.add(file.name)

    # --- files and shards --------------------------------------------------------------------------------------------

    def _on_sealed(self, sealed: Sealed) -> None:
        """A file is durable in `part`: settle it, record it, and only then let its source go."""
        file = self._files[sealed.file]
        self._staging.settle(sealed.file)
        self._journal.append(
            {"event": "sealed", "file": sealed.file, "sha256": sealed.sha256, "size": file.size_bytes}, durable=True
        )
        self._sealed[sealed.file] = (sealed.sha256, file.size_bytes)
        self._free(self._shards[file.shard])
        if self._uploader:
            self._uploader.submit(
                self._staging.ready / file.name, StoredFile(file.name, file.size_bytes, sealed.sha256)
            )
        self._tell("file", sealed.file)

    def _on_fetched(self, got: Fetched) -> None:
        """Queue the tasks of a shard; those that an earlier run did are only checked."""
        if got.error:
            self._error = self._error or got.error
            return
        if got.sha256:
            self._journal.append({"event": "fetched", "shard": got.shard.name, "sha256": got.sha256}, durable=False)
        file = self._file_of(got.shard)
        kept = self._staging.has_part(file)
        for task in self._tasks[file.name]:
            self._todo.append(Checked(task, self._done[task.id]) if kept and task.id in self._done else task)
        if not self._tasks[file.name]:  # only empty tensors
            self._complete(file.name)

    def _on_passed(self, passed: Passed) -> None:
        if passed.error:
            self._error = self._error or passed.error
            return
        (self._passed if passed.sha256 else self._wrong).add(passed.shard.name)
        self._complete(self._file_of(passed.shard).name)

    def _on_uploaded(self, uploaded: Uploaded) -> None:
        """A file is in the destination's storage: record that, and only then let it go."""
        if uploaded.error:
            self._error = self._error or uploaded.error
            return
        name = uploaded.file.name
        self._journal.append({"event": "uploaded", "file": name, "to": self._destination}, durable=True)
        self._uploaded.add(name)
        if not self._limits.keep_local:
            self._staging.drop(name)
            self._admission.release(self._files[name].shard)
        self._tell("upload", name)

    def _free(self, shard: Shard) -> None:
        """Delete what we fetched, or the user's own shard when that was asked for."""
        if self._supply.free(shard, self._limits.delete_source):
            self._journal.append({"event": "freed", "shard": shard.name}, durable=False)
        self._admission.free(shard.name)

    def _admit(self) -> None:
        self._bring(iter(self._admission.next, None))

    def _bring(self, costs: Iterable[ShardCost]) -> None:
        for cost in costs:
            shard = self._shards[cost.name]
            self._supply.begin(shard, self._tasks[self._file_of(shard).name])

    # --- start -----------------------------------------------------------------------------------------------------

    def _account(self) -> Admission:
        """The account of disk, with what an earlier run left. Raises BudgetTooSmall, DiskFull."""
        uploads = self._uploader is not None and not self._limits.keep_local
        todo = [
            replace(cost, staged_bytes=self._supply.staged_bytes(self._shards[cost.name]))
            for cost in shard_costs(self._plan, staged=False)
            if cost.name not in self._sealed
        ]
        kept = record_bytes(self._plan)
        here = {f: size for f, (_, size) in self._sealed.items() if f not in self._uploaded or self._limits.keep_local}
        waiting = {self._files[f].shard: size for f, size in here.items()} if uploads else {}
        if not uploads:
            kept += sum(here.values())
        hurried = not self._source.remote and self._uploader is None
        admission = Admission(todo, kept, waiting, self._limits.max_disk_bytes, uploads, hurried)
        check_space(self._plan, self._staging, todo, uploads, self._limits.delete_source)
        return admission

    def _resume(self) -> None:
        """Take up what an earlier run left: free what it could not free any more, upload what it had sealed."""
        for name, (sha256, size_bytes) in self._sealed.items():
            self._free(self._shards[self._files[name].shard])
            if not self._uploader:
                continue
            if name not in self._uploaded:
                self._uploader.submit(self._staging.find(name), StoredFile(name, size_bytes, sha256))
            elif not self._limits.keep_local:
                self._staging.drop(name)  # a crash may have come between the journal line and the deletion
        first = list(iter(self._admission.next, None))
        self._supply.trim(self._admission.staged, self._admission.begun)  # before anything new comes
        self._bring(first)

    def _file_of(self, shard: Shard) -> OutputFile:
        return self._files[shard.name]

    def _tell(self, stage: Stage, item: str) -> None:
        self._report(
            Progress(
                stage=stage,
                item=item,
                done_bytes=self._done_bytes,
                total_bytes=self._total_bytes,
                resumed_bytes=self._resumed_bytes,
                fetched_bytes=self._supply.fetched_bytes,
                uploaded_bytes=self._uploader.uploaded_bytes if self._uploader else 0,
                done_files=len(self._sealed),
                total_files=len(self._files),
            )
        )


def source_paths(plan: Plan, source: Source, staging: Staging) -> dict[str, str]:
    """Where workers find each source shard."""
    paths: dict[str, str] = {}
    for shard in plan.checkpoint.shards:
        own = source.local_path(shard.name)
        paths[shard.name] = str(own) if own else str(staging.src / shard.name)
    return paths


def _task_of(work: Task | Checked | Streamed) -> Task:
    return work.task if isinstance(work, Checked | Streamed) else work
