"""The functions of jobs that scripts call; see shardq.nodes."""

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from shardq.limits import Limits
from shardq.nodes.ending import finalize as end_job
from shardq.nodes.environment import find_rank
from shardq.nodes.folder import JobFolder, JobRecord
from shardq.nodes.job import STALE_S, Ends, Job, open_job
from shardq.nodes.working import Worked, work_on
from shardq.opening import check_engines, open_destinations, open_within
from shardq.progress import Progress, Report
from shardq.recipe import Recipe, as_recipe
from shardq.run import Result
from shardq.sources import open_source


def begin_job(
    folder: str | Path,
    source: str | Path,
    recipe: str | Recipe = "W4A16",
    *,
    subfolder: str | None = None,
    limits: Limits | None = None,
    push_to: str | None = None,
    private: bool = False,
    branch: str | None = None,
    targets: Sequence[str] = (),
    stale_s: float | None = None,
    words: Sequence[str] = (),
) -> Job:
    """Begin to make what `quantize` makes together with other machines that see `folder`, or join them: for `work` and
    `finalize`. The output, in `output` of the folder, has the same bytes.

    A worker that was not heard of for `stale_s` is believed dead. `words` are kept for who joins by the command line.
    Raises what `quantize` refuses before a weight is read, and RecipeChanged where the folder holds another job.
    """
    wanted = as_recipe(recipe)
    ends = partial(
        _open_ends,
        _pin(str(source), subfolder, JobFolder(Path(folder)).read()),
        subfolder,
        wanted,
        limits or Limits(),
        push_to,
        private,
        branch,
    )
    check = partial(check_engines, targets=targets)
    return open_job(Path(folder), ends, wanted, check, words, STALE_S if stale_s is None else stale_s)


def work(
    job: Job,
    *,
    worker: str | None = None,
    limits: Limits | None = None,
    report: Report | None = None,
    wait: bool = True,
    scratch: str | Path | None = None,
) -> Worked:
    """Make files of a job until all are made; whoever finishes the last one publishes. With `wait` the call returns
    when the output is complete, and takes over from workers that die.

    `worker`: "i/N", by default what a scheduler's environment says; it only decides where this one begins. Unfinished
    files are kept in `scratch`, by default in the job folder.
    """
    rank = find_rank(worker, os.environ)
    return work_on(job, rank, limits or Limits(), report or _silent, wait, None if scratch is None else Path(scratch))


def work_with_ray(job: Job, address: str = "auto", *, limits: Limits | None = None) -> Worked:
    """Make a job on a Ray cluster, of which all nodes see the job folder: one task for each output file that is left,
    with `limits.parallel` CPUs; this process publishes. Needs shardq[ray]. Raises MissingPackage, TaskFailed."""
    from shardq.nodes.ray import work_on_cluster  # few need it

    return work_on_cluster(job, address, limits or Limits())


def finalize(job: Job, *, limits: Limits | None = None, report: Report | None = None) -> Result:
    """Publish a job of which all files are made. Raises JobUnfinished with what is missing, and what a run does."""
    return end_job(job, limits or Limits(), report or _silent)


def _pin(source: str, subfolder: str | None, record: JobRecord | None) -> str:
    """The same for other processes and later: a folder from everywhere, a repo at the commit that the job has, a new
    one's at its newest."""
    if Path(source).exists():
        return str(Path(source).absolute())
    if "@" in source or source == "demo":
        return source
    if record and record.identity["source.label"] == source.removeprefix("hf://"):
        return f"{source}@{record.identity['source.commit']}"
    commit = open_source(source, subfolder).commit
    return f"{source}@{commit}" if commit else source


def _open_ends(
    source: str, subfolder: str | None, recipe: Recipe, limits: Limits, push_to: str | None, private: bool,
    branch: str | None,
) -> Ends:  # fmt: skip
    """Source and destination of a job."""
    (place,) = open_destinations(push_to, [recipe], private, branch, limits)
    return open_within(source, subfolder, limits), place


def _silent(_step: Progress) -> None:
    """Report nothing."""
