"""The end of a job: all files are there, and an ordinary run publishes them."""

import os
import shutil
from contextlib import suppress

from shardq.errors import JobUnfinished
from shardq.files.atomic import write_atomic
from shardq.journal import encode_events
from shardq.limits import Limits
from shardq.nodes.job import Job, check_limits
from shardq.nodes.records import journal_events
from shardq.progress import Report
from shardq.publish import is_complete
from shardq.run import Order, Result, quantize_all
from shardq.staging import Staging


def finalize(job: Job, limits: Limits, report: Report) -> Result:
    """Publish the output of a job. May be called by many, and again after a crash.

    Raises JobUnfinished while files are missing, OutputLocked while another process of this machine is at it, and what
    a run does.
    """
    check_limits(limits)
    if left := job.left():
        raise JobUnfinished(
            f"{job.folder.path}: {len(left)} of {len(job.record.files)} files are missing, the first {left[0]}: run "
            f"`shardq worker --job {job.folder.path}`"
        )
    staging = Staging(job.folder.output)
    if not staging.journal.exists() and not is_complete(staging.out):
        staging.make()
        write_atomic(staging.journal, encode_events(journal_events(job)))
    order = Order(job.plan.recipe, staging.out, job.destination)
    (result,) = quantize_all(job.source, (order,), limits, False, report, lambda plan: plan)
    job.folder.complete(result.pushed_commit)
    gone = job.folder.path / f".work-{os.urandom(4).hex()}"
    with suppress(OSError):  # moved first: nobody gives his folder to others while it is removed
        job.folder.work.rename(gone)
        shutil.rmtree(gone)
    return result
