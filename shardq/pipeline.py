"""Runs a plan: bring source shards, hand tasks to workers, seal finished files, free source shards.

Order of events for an output file: all its tasks -> fsync and hash in `part` -> rename to `ready` -> fsync of the
folder -> journal line, fsync -> only then is its source shard freed. A crash loses at most unjournaled tasks.
"""

import errno
import logging
import os
import shutil
import signal
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from shardq.checkpoint import Shard
from shardq.errors import BudgetTooSmall, DiskFull, Interrupted, ShardqError, SourceUnreadable, Terminated
from shardq.executors.base import Executor, Job, Outcome
from shardq.fetcher import Fetcher
from shardq.files.atomic import preallocate, pwrite_all, writing
from shardq.journal import Journal
from shardq.limits import Limits
from shardq.plans import OutputFile, Plan
from shardq.progress import Progress, Report, Stage
from shardq.signals import StopFlag
from shardq.sources.base import Source
from shardq.staging import Progressed, Staging
from shardq.tasks import Checked, Done, Sealed, SealTask, Task

logger = logging.getLogger(__name__)
POLL_S: Final = 1.0  # longest wait without looking at the stop flag
SEAL_COST_BYTES: Final = 1 << 20


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
        report: Report,
    ) -> None:
        self._plan, self._source, self._staging = plan, source, staging
        self._journal, self._limits, self._report = journal, limits, report
        self._files: Mapping[str, OutputFile] = {f.name: f for f in plan.files}
        self._tasks: dict[str, list[Task]] = {f.name: [] for f in plan.files}
        for task in plan.tasks:
            self._tasks[task.file].append(task)
        self._done: dict[int, Done] = dict(before.tasks)
        self._sealed: dict[str, tuple[str, int]] = dict(before.sealed)
        self._left = {f: len(ts) for f, ts in self._tasks.items()}  # tasks of this run still to finish, by file
        self._todo: deque[Task | Checked | SealTask] = deque()
        self._begun: set[str] = set()  # output files that have their size and header
        self._error: ShardqError | None = None
        self._fetcher: Fetcher | None = None
        self._resumed_bytes = sum(t.source_bytes for f in self._sealed for t in self._tasks[f])
        self._done_bytes = self._resumed_bytes
        self._total_bytes = plan.source_bytes  # a sum over all tensors, told at every step

    def run(self, executor: Executor) -> Finished:
        """Do everything that is left. Raises Interrupted, Terminated, or the first error of a task or download."""
        self._tell("start", "")
        self._check_space()
        with StopFlag() as stop:
            try:
                self._bring()
                self._loop(executor, stop)
            finally:
                if self._fetcher:
                    self._fetcher.close()
        return Finished(self._done, self._sealed)

    # --- loop ------------------------------------------------------------------------------------------------------

    def _loop(self, executor: Executor, stop: StopFlag) -> None:
        while len(self._sealed) < len(self._files) or executor.unfinished():
            if stop.signal or self._error:
                self._drain(executor, stop)
            while self._todo and executor.room() > 0:
                work = self._todo.popleft()
                if (name := work.task.file if isinstance(work, Checked) else work.file) not in self._begun:
                    self._begin(self._files[name])
                executor.submit(self._job(work))
            also = [stop.ready] + ([self._fetcher.ready] if self._fetcher else [])
            for outcome in executor.wait(POLL_S, also):
                self._collect(outcome)
            if self._fetcher:
                self._tell("fetch", "")
            for got in self._fetcher.take() if self._fetcher else ():
                if got.error:
                    self._error = self._error or got.error
                else:
                    self._journal.append(
                        {"event": "fetched", "shard": got.shard.name, "sha256": got.sha256},
                        durable=False,
                    )
                    self._enqueue(got.shard.name)

    def _drain(self, executor: Executor, stop: StopFlag) -> None:
        """Let running tasks finish, keep what they did, and raise."""
        executor.cancel_queued()
        while executor.unfinished():
            for outcome in executor.wait(POLL_S):
                self._collect(outcome)
        if self._error:
            raise self._error
        kind = Terminated if stop.signal == signal.SIGTERM else Interrupted
        raise kind(
            f"stopped; {100 * self._done_bytes // max(1, self._total_bytes)} % is done and kept in "
            f"{self._staging.work}: run the same command again to resume"
        )

    def _job(self, work: Task | Checked | SealTask) -> Job:
        if isinstance(work, SealTask):
            number = len(self._plan.tasks) + list(self._files).index(work.file)
            return Job(number, work, SEAL_COST_BYTES, f"sealing {work.file}")
        task = work.task if isinstance(work, Checked) else work
        return Job(task.id, work, task.cost_bytes, f"{task.tensor} in {task.shard}")

    def _collect(self, outcome: Outcome) -> None:
        match outcome.result:
            case None:
                self._error = self._error or outcome.error
            case Sealed() as sealed:
                self._finish(sealed)
            case Done() as done:
                self._note(done)
            case other:
                raise TypeError(f"a worker answered {other!r}")

    def _note(self, done: Done) -> None:
        task = self._plan.tasks[done.id]
        if not done.reused:
            self._journal.append(
                {"event": "task", "id": done.id, "checksum": done.checksum, "sse": done.squared_error,
                 "ssw": done.squared_weight, "max": done.max_error},
                durable=False,
            )  # fmt: skip
        else:
            self._resumed_bytes += task.source_bytes
        self._done[done.id] = done
        self._done_bytes += task.source_bytes
        self._left[task.file] -= 1
        self._tell("work", task.shard)
        if self._left[task.file] == 0:
            self._todo.appendleft(SealTask(task.file, self._files[task.file].size_bytes))

    def _finish(self, sealed: Sealed) -> None:
        """A file is durable in `part`: settle it, record it, and only then let its source go."""
        file = self._files[sealed.file]
        self._staging.settle(sealed.file)
        self._journal.append(
            {
                "event": "sealed",
                "file": sealed.file,
                "sha256": sealed.sha256,
                "size": file.size_bytes,
            },
            durable=True,
        )
        self._sealed[sealed.file] = (sealed.sha256, file.size_bytes)
        self._free(file.shard)
        self._tell("file", sealed.file)

    # --- source shards -----------------------------------------------------------------------------------------------

    def _bring(self) -> None:
        """Queue what is at hand and fetch the rest."""
        missing: list[Shard] = []
        staged: list[Shard] = []
        for shard in self._plan.checkpoint.shards:
            if shard.name in self._sealed:
                self._free(shard.name)  # a crash may have come between the journal line and the deletion
            elif self._source.local_path(shard.name):
                self._enqueue(shard.name)
            elif self._staged(shard).exists():
                staged.append(shard)
                self._enqueue(shard.name)
            else:
                missing.append(shard)
        if missing and not self._source.remote:
            raise SourceUnreadable(
                f"shard {missing[0].name} of {self._source.label} is gone since its header was read: put it back and "
                "run the same command again"
            )
        if missing:
            cap = self._limits.max_disk_bytes
            left = None if cap is None else cap - self._plan.output_bytes
            self._fetcher = Fetcher(self._source, self._staging.src, missing, staged, left)

    def _staged(self, shard: Shard) -> Path:
        return self._staging.src / shard.name

    def _enqueue(self, shard: str) -> None:
        """Queue the tasks of a shard; those that an earlier run did are only checked."""
        file = self._files[shard]
        path = self._staging.part / file.name
        kept = path.exists() and path.stat().st_size == file.size_bytes
        for task in self._tasks[file.name]:
            self._todo.append(Checked(task, self._done[task.id]) if kept and task.id in self._done else task)
        if not self._tasks[file.name]:  # only empty tensors
            self._todo.append(SealTask(file.name, file.size_bytes))

    def _begin(self, file: OutputFile) -> None:
        """Make an output file of its final size, header first; only now, so that disk is taken as it is freed."""
        path = self._staging.part / file.name
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                preallocate(fd, file.size_bytes, str(path))
                pwrite_all(fd, file.header, 0)
            finally:
                os.close(fd)
        self._begun.add(file.name)

    def _free(self, name: str) -> None:
        """Delete what we fetched, or the user's own shard when that was asked for."""
        shard = next(s for s in self._plan.checkpoint.shards if s.name == name)
        staged, own = self._staged(shard), self._source.local_path(name)
        with writing(own or staged):
            if staged.exists():
                staged.unlink()
                if self._fetcher:
                    self._fetcher.free(shard)
            elif own and self._source.commit is None and self._limits.delete_source:  # a folder, never the Hub's cache
                own.unlink()
                logger.info("deleted source shard %s", own)
            else:
                return
        self._journal.append({"event": "freed", "shard": name}, durable=False)

    def _check_space(self) -> None:
        """Refuse a run that the disk or --max-disk cannot hold, before it starts. Raises DiskFull, BudgetTooSmall."""
        largest = max((s.size_bytes for s in self._missing()), default=0)
        cap, least = self._limits.max_disk_bytes, self._plan.output_bytes + largest
        if cap is not None and cap < least:
            raise BudgetTooSmall(
                f"--max-disk {cap / 1e9:.2f} GB is too small: the output takes {self._plan.output_bytes / 1e9:.2f} GB "
                f"and the largest shard to fetch {largest / 1e9:.2f} GB; expected at least {least / 1e9:.2f} GB"
            )
        need = largest + self._output_growth_bytes()
        free = shutil.disk_usage(self._staging.work).free
        if need > free:
            raise DiskFull(
                f"{self._staging.out} needs {need / 1e9:.2f} GB more and its disk has {free / 1e9:.2f} GB free: free "
                "some space or choose another --output-dir"
            )

    def _output_growth_bytes(self) -> int:
        """The most by which the run will ever have grown the disk's content, fetched shards apart: files are made in
        order, and with --delete-source each makes room for others once it is done."""
        left = [f for f in self._plan.files if f.name not in self._sealed]
        grown = [f.size_bytes - _allocated(self._staging.part / f.name) for f in left]
        if not self._limits.delete_source:
            return sum(grown)
        sizes = {s.name: s.size_bytes for s in self._plan.checkpoint.shards}
        now = peak = 0
        for f, more in zip(left, grown, strict=True):
            now += more
            peak = max(peak, now)
            now -= sizes[f.shard]
        return peak + max(grown, default=0)  # the next file is begun before the last one is done

    def _missing(self) -> Iterator[Shard]:
        for shard in self._plan.checkpoint.shards:
            here = self._source.local_path(shard.name) or self._staged(shard).exists()
            if shard.name not in self._sealed and not here:
                yield shard

    def _tell(self, stage: Stage, item: str) -> None:
        self._report(
            Progress(
                stage=stage,
                item=item,
                done_bytes=self._done_bytes,
                total_bytes=self._total_bytes,
                resumed_bytes=self._resumed_bytes,
                fetched_bytes=self._fetcher.fetched_bytes if self._fetcher else 0,
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


def _allocated(path: Path) -> int:
    """Bytes of disk that a file already holds."""
    try:
        return path.stat().st_blocks * 512
    except OSError as e:
        if e.errno == errno.ENOENT:
            return 0
        raise
