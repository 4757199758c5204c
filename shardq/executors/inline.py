"""Runs jobs in the caller's process, one per `wait`: for one worker, notebooks and tests."""

import math
import os
import select
from collections import deque
from functools import partial
from typing import TYPE_CHECKING, Self

from shardq.executors.base import JOBS_QUEUED_PER_WORKER, Handler, Job, Outcome, attempt, load_handler

if TYPE_CHECKING:  # multiprocessing takes a hundredth of a second to load, and one process needs none of it
    from collections.abc import Sequence
    from multiprocessing.connection import Connection


class InlineExecutor:
    """An executor without processes. Only one job is in memory at a time, so it needs no byte budget."""

    def __init__(self, entry: str, context: object) -> None:
        """Build the handler (see `load_handler`); what that raises, this raises."""
        self._handler: Handler | None = load_handler(entry, context)
        self._queue: deque[Job] = deque()
        self._closed = False

    def submit(self, job: Job) -> None:
        """Queue a job; see Executor."""
        if self._closed:
            raise RuntimeError("the executor is closed")
        self._queue.append(job)

    def wait(self, timeout_s: float | None, also: "Sequence[int | Connection]" = ()) -> list[Outcome]:
        """Run the next job unless `also` is readable; a job that has begun is not cut short by `timeout_s`."""
        if also and _is_any_readable(also, 0 if self._queue else timeout_s):
            return []
        if not self._queue or self._handler is None:
            return []
        job = self._queue.popleft()
        result, error = attempt(job.name, partial(self._handler, job.work))
        return [Outcome(job, result, error, os.getpid())]

    def unfinished(self) -> int:
        """Jobs not run yet."""
        return len(self._queue)

    def room(self) -> int:
        """How many more jobs are worth queueing now."""
        return max(0, JOBS_QUEUED_PER_WORKER - len(self._queue))

    def cancel_queued(self) -> list[Job]:
        """Take back every job not run yet."""
        jobs = list(self._queue)
        self._queue.clear()
        return jobs

    def close(self) -> None:
        """Drop what is queued, and the handler with the memory and files that it holds."""
        self._queue.clear()
        self._handler = None
        self._closed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()


def _is_any_readable(objects: "Sequence[int | Connection]", timeout_s: float | None) -> bool:
    """Wait until one of them is, or the time is up (None: no limit)."""
    poll = select.poll()
    for each in objects:
        poll.register(each, select.POLLIN)
    return bool(poll.poll(None if timeout_s is None else math.ceil(1000 * timeout_s)))
