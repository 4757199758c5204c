"""A job as a worker holds it: the folder, what is made, and where it goes."""

import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import zstandard

from shardq.checkpoint import Checkpoint
from shardq.checkpoint_record import decode_checkpoint, encode_checkpoint
from shardq.destinations.base import Destination
from shardq.errors import BadOption, DiskFull, RecipeChanged
from shardq.gguf.model_files import needed_texts
from shardq.headers import read_checkpoint
from shardq.limits import Limits
from shardq.nodes.folder import FORMAT, JobFolder, JobRecord
from shardq.plans import Plan, make_plan
from shardq.push import check_push, prepare_push
from shardq.recipe import Recipe
from shardq.run import source_folder, source_stamps
from shardq.sources.base import Source
from shardq.staging import check_folder, differing

STALE_S: Final = 120.0  # a worker that has not been heard of for so long is believed dead


Ends = tuple[Source, Destination | None]


@dataclass(frozen=True, slots=True)
class Posted:
    """A job on its way to another process: what has connections is opened there."""

    folder: JobFolder
    record: JobRecord
    plan: Plan
    open_ends: Callable[[], Ends]

    def open(self) -> "Job":
        """The job, where it is to be worked on."""
        return Job(self.folder, self.record, *self.open_ends(), self.plan, self.open_ends)


@dataclass(frozen=True, slots=True)
class Job:
    """A job that was begun, planned again from the headers here."""

    folder: JobFolder
    record: JobRecord
    source: Source
    destination: Destination | None
    plan: Plan
    open_ends: Callable[[], Ends]

    def post(self) -> Posted:
        """The same for another process."""
        return Posted(self.folder, self.record, self.plan, self.open_ends)

    def unit(self, file: str) -> str:
        """How claims and records call an output file."""
        return f"{self.record.files.index(file):05d}"

    def staging_folder(self, scratch: Path | None) -> Path:
        """Where workers have their unfinished files."""
        return self.folder.work if scratch is None else scratch / f"shardq-{self.record.fingerprint[:16]}"

    def is_over(self) -> bool:
        """True once the output is complete."""
        return self.folder.completed() is not None

    def left(self) -> list[str]:
        """Files without a record, in order."""
        there = {p.name for p in self.folder.done.glob("*.json")}
        return [f for number, f in enumerate(self.record.files) if f"{number:05d}.json" not in there]

    def check_source(self, shards: Sequence[str]) -> None:
        """Refuse shards that were changed since the job was begun. Raises RecipeChanged."""
        now = source_stamps(self.plan, self.source)
        for name in shards:
            if now.get(name) != self.record.stamps.get(name):
                raise RecipeChanged(
                    f"source shard {name} has another time than when {self.folder.path} was begun: it was changed, or "
                    "is a copy without its times; begin another job, or copy with times (cp -p, rsync -a)"
                )


def open_job(
    path: Path,
    open_ends: Callable[[], Ends],
    recipe: Recipe,
    check: Callable[[Plan], object],
    words: Sequence[str] = (),
    stale_s: float = STALE_S,
) -> Job:
    """Begin a job, or join one of the same source, recipe, destination and version.

    `open_ends` opens source and destination, and can be sent to other processes; `check` may refuse a plan; `words`: of
    the command line, for those who join without them; `stale_s` counts for a new job only. Every refusal of a run alone
    comes here, and RecipeChanged where the job in the folder is another one.
    """
    folder = JobFolder(path.absolute())
    source, destination = open_ends()
    check_folder(folder.output, source_folder(source))
    checkpoint = needed_texts(_read_headers(folder, source), source, [recipe])
    plan = make_plan(checkpoint, recipe)
    check(plan)
    label = destination.label if destination else None
    files = tuple(f.name for f in plan.files)
    wanted = JobRecord(
        FORMAT, plan.fingerprint, plan.identity(), files, source_stamps(plan, source), label, stale_s, tuple(words)
    )
    record = folder.read()
    if destination and folder.completed() is None and prepare_push(plan.identity(), destination) is None:
        check_push(plan, source, destination)
    record = record or _begin(folder, wanted, plan)
    if record.identity != wanted.identity or record.push_to != label:
        old, new = ({**r.identity, "push_to": r.push_to} for r in (record, wanted))
        raise RecipeChanged(
            f"{path} holds a job with other parameters; these differ: {differing(old, new)}. Repeat the command that "
            "began it, run `shardq worker` with --job alone, or choose another --job"
        )
    job = Job(folder, record, source, destination, plan, open_ends)
    if folder.completed() is None:
        job.check_source([s.name for s in plan.checkpoint.shards])
    return job


def _read_headers(folder: JobFolder, source: Source) -> Checkpoint:
    """The source's headers; of a commit those that the first worker has read, as the Hub counts requests: many workers
    would be sent away if each asked for all headers."""
    if source.commit is not None:
        with suppress(OSError, ValueError, LookupError, TypeError, zstandard.ZstdError):  # none yet: they are read
            recorded = decode_checkpoint(folder.headers.read_bytes())
            if (recorded.label, recorded.commit) == (source.label, source.commit):
                return recorded
    return read_checkpoint(source)


def _begin(folder: JobFolder, record: JobRecord, plan: Plan) -> JobRecord:
    """Raises DiskFull where the output will not fit beside what is there."""
    free = shutil.disk_usage(next(p for p in (folder.path, *folder.path.parents) if p.exists())).free
    if record.push_to is None and plan.output_bytes > free:
        raise DiskFull(
            f"{folder.path} needs {plan.output_bytes / 1e9:.2f} GB for the output and its disk has {free / 1e9:.2f} GB "
            "free: free some space or choose another --job"
        )
    return folder.make(record, encode_checkpoint(plan.checkpoint))


def check_limits(limits: Limits) -> None:
    """Raises BadOption for what one worker may not do to the others."""
    if limits.delete_source or limits.keep_local:
        raise BadOption(
            "a job neither deletes its source, which other workers read, nor keeps files that are uploaded: take back "
            "delete_source and keep_local"
        )
