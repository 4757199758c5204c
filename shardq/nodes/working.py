"""What a worker does: claim files, make them, wait for others, and end the job if it is there for it."""

import math
import select
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from shardq.errors import OutputLocked, ShardqError
from shardq.limits import Limits
from shardq.nodes.claims import Claims
from shardq.nodes.ending import finalize
from shardq.nodes.environment import Rank
from shardq.nodes.job import Job, Posted, check_limits
from shardq.nodes.maker import Maker
from shardq.nodes.slots import own_slot
from shardq.progress import Report
from shardq.run import Result
from shardq.signals import StopFlag

END: Final = "end"  # the claim of whoever publishes
MOST_FILES: Final = 8  # claimed at a time
ROUNDS: Final = 2  # batches that are left for each worker when one is claimed
POLLS: Final = 10  # looks at the job in the time after which a claim counts as left
LONGEST_POLL_S: Final = 10.0


@dataclass(frozen=True, slots=True)
class Worked:
    """What a worker did."""

    files: tuple[str, ...]  # that it made
    complete: bool  # the output is there
    result: Result | None  # of the worker that published


def work_on(job: Job, rank: Rank, limits: Limits, report: Report, wait: bool, scratch: Path | None = None) -> Worked:
    """Make files of a job until all are made; whoever comes last publishes. With `wait` it stays until the output is
    there, to take over from workers that die. Unfinished files are kept in `scratch`, by default in the job folder.
    Raises any ShardqError; what is finished is kept."""
    check_limits(limits)
    if job.is_over():
        return Worked((), True, None)
    made: list[str] = []
    result = None
    try:
        with (
            StopFlag() as stop,
            own_slot(job.staging_folder(scratch), job.is_over) as staging,
            Claims(job.folder.claims, job.record.stale_s) as claims,
        ):
            result = _work(job, rank, Maker(job, staging, limits, report), claims, stop, wait, made)
    except ShardqError:
        if not job.is_over():
            raise  # else others took over, and have removed what we worked in
    return Worked(tuple(made), job.is_over(), result)


def make_file(posted: Posted, file: str, limits: Limits) -> None:
    """Make one file of a job, for who sees to it that nobody else makes it at the same time: then that is only waste.
    Raises any ShardqError."""
    job = posted.open()
    with StopFlag() as stop, own_slot(job.folder.work, job.is_over) as staging:
        if file in job.left():
            Maker(job, staging, limits, lambda _: None).make([file], stop, lambda _: None)


def _work(
    job: Job, rank: Rank, maker: Maker, claims: Claims, stop: StopFlag, wait: bool, made: list[str]
) -> Result | None:
    """The result if this worker has published."""

    def told(file: str) -> None:
        made.append(file)
        claims.drop(job.unit(file))

    begun = maker.begun()
    while not job.is_over():
        stop.heed(f"{len(made)} files were made here: run the same command again to go on")
        left = job.left()
        if not left and claims.take([END], 1):
            try:
                return finalize(job, maker.limits, maker.report)
            except OutputLocked:
                pass  # a process of this machine is at it, and was only slow
        elif left and (batch := _claim(job, rank, claims, left, begun)):
            maker.make(batch, stop, told)
            continue
        if not wait:
            break
        poll_s = min(LONGEST_POLL_S, job.record.stale_s / POLLS)
        select.select([stop.ready], [], [], poll_s)
    return None


def _claim(job: Job, rank: Rank, claims: Claims, left: Sequence[str], begun: frozenset[str]) -> list[str]:
    """Some files that nobody else makes: what is begun here first, then this worker's share."""
    missing, files = set(left), job.record.files
    wanted = [files[n] for n in rank.order(len(files)) if files[n] in missing]
    wanted.sort(key=lambda f: f not in begun)
    most = batch_files(len(left), max(rank.least_count, claims.workers()))
    units = {job.unit(f): f for f in wanted}
    taken = claims.take(units, most)
    now_left = {job.unit(f) for f in job.left()}  # some may have been finished between the two looks
    for unit in set(taken) - now_left:
        claims.drop(unit)
    return [units[unit] for unit in taken if unit in now_left]


def batch_files(left: int, workers: int) -> int:
    """So many files are claimed at a time while `left` are left: several, so that one is fetched while another is made,
    and one at the end, so that all workers end together."""
    return max(1, min(MOST_FILES, math.ceil(left / (ROUNDS * workers))))
