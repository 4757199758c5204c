"""Makes some output files of a job in a staging folder: a run that takes all other files as done elsewhere."""

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Self

from shardq.lane import Lane
from shardq.limits import Limits
from shardq.nodes.job import Job
from shardq.nodes.records import JobStorage, write_record
from shardq.onepass import OnePass
from shardq.progress import Progress, Report
from shardq.run import run_lanes
from shardq.signals import StopFlag
from shardq.staging import Progressed, Staging
from shardq.uploader import Uploader

IN_FOLDER = "job"  # what a worker's journal says of a file that is in the job folder


@dataclass(frozen=True, slots=True)
class Maker:
    """`staging` is locked. Within it work goes on where a dead worker stopped."""

    job: Job
    staging: Staging
    limits: Limits
    report: Report

    def begun(self) -> frozenset[str]:
        """Files of which something is there."""
        if not self.staging.journal.exists():
            return frozenset()
        journal, before = self.staging.open(self.job.plan, self.job.record.stamps, False, self._label)
        journal.close()
        tasks = self.job.plan.tasks
        return frozenset(before.sealed).union(*(tasks[i].files for i in before.tasks))

    def make(self, files: Collection[str], stop: StopFlag, told: Callable[[str], None]) -> None:
        """Make files, store them and write their records; `told` is called with each. Raises any ShardqError."""
        job = self.job
        journal, before = self.staging.open(job.plan, job.record.stamps, False, self._label)
        try:
            lane = Lane(
                0, job.plan, self.staging, journal, self._others_done(before, files), Uploader(JobStorage(job)),
                self._label,
            )  # fmt: skip
            for file in sorted(lane.uploaded.intersection(files)):  # a dead worker did not come to say so
                self._record(lane, file, told)
            work = OnePass((job.plan,))
            remote = job.source.remote
            memory = self.limits.share_memory(work, remote, remote or job.destination is not None)

            elsewhere = _Elsewhere.of(work, files)

            def report(step: Progress) -> None:
                if step.stage == "upload":
                    self._record(lane, step.item, told)
                if step.stage != "upload" or job.destination:
                    self.report(elsewhere.without(step))

            run_lanes(work, job.source, [lane], self.limits, memory, report, stop)
        finally:
            journal.close()

    @property
    def _label(self) -> str:
        return self.job.record.push_to or IN_FOLDER

    def _others_done(self, before: Progressed, files: Collection[str]) -> Progressed:
        """What is left to do is `files`."""
        others = {f.name: ("", f.size_bytes) for f in self.job.plan.files if f.name not in files}
        return replace(before, sealed={**before.sealed, **others}, uploaded=before.uploaded | others.keys())

    def _record(self, lane: Lane, file: str, told: Callable[[str], None]) -> None:
        write_record(self.job, lane, file)
        told(file)


@dataclass(frozen=True, slots=True)
class _Elsewhere:
    """What of a plan others make."""

    source_bytes: int
    files: int

    @classmethod
    def of(cls, work: OnePass, files: Collection[str]) -> Self:
        """All but `files`."""
        own = frozenset(files)
        bundles = (b for b in work.bundles if all(own.isdisjoint(m.task.files) for m in b.members))
        return cls(sum(b.source_bytes for b in bundles), len(work.plans[0].files) - len(files))

    def without(self, step: Progress) -> Progress:
        """The same of our own part."""
        return replace(
            step,
            done_bytes=step.done_bytes - self.source_bytes,
            total_bytes=step.total_bytes - self.source_bytes,
            resumed_bytes=step.resumed_bytes - self.source_bytes,
            done_files=step.done_files - self.files,
            total_files=step.total_files - self.files,
        )
