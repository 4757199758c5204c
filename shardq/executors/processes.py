"""A supervised pool of worker processes.

The standard pools lose every running task, or hang, when one worker is killed; here only the killed worker's job is run
again. Workers are forks of the command line's process while it has no other thread (fork is unsafe beside threads).
Else they come from a fork server that has the handler's module loaded, or by spawn where there is no fork server; then
multiprocessing imports the caller's main script again in every worker, so a script must start shardq under
`if __name__ == "__main__":`. Without it the workers end with multiprocessing's own RuntimeError on stderr, and every
job fails with a TaskFailed that says so.
"""

import logging
import os
import signal
import time
from collections import Counter, deque
from collections.abc import Sequence
from multiprocessing import connection
from typing import Final, Self

from shardq.budget import ByteBudget
from shardq.errors import ShardqError, TaskFailed
from shardq.executors.base import JOBS_QUEUED_PER_WORKER, Job, Outcome
from shardq.executors.child import Assignment, Reply
from shardq.executors.worker_process import (
    WorkerProcess,
    cause_of_death,
    end_worker,
    start_context,
    start_worker,
)

logger = logging.getLogger(__name__)

RETRIES: Final = 2  # of a job whose worker died
START_ATTEMPTS: Final = 3  # failed starts in a row, where trying again may help


class ProcessExecutor:
    """Runs jobs in worker processes under a byte budget; the methods are those of Executor."""

    def __init__(self, entry: str, context: object, workers: int, budget: ByteBudget) -> None:
        """Start the workers; each builds the handler by itself (see `load_handler`; `context` is pickled).

        Where no handler can be built every job fails with the reason. Raises ValueError for less than one worker.
        """
        if workers < 1:
            raise ValueError(f"a process executor needs at least 1 worker, found {workers}")
        self._entry = entry
        self._context = context
        self._budget = budget
        self._limit_workers = workers
        self._started = 0
        self._failed_starts = 0  # in a row
        self._workers: list[WorkerProcess] = []
        self._queue: deque[Job] = deque()
        self._outcomes: list[Outcome] = []
        self._deaths: Counter[int] = Counter()  # by job id
        self._broken: ShardqError | None = None  # why there are no workers any more
        self._closed = False
        self._fill()

    def submit(self, job: Job) -> None:
        """Queue a job and start it if a worker is idle and the budget admits it."""
        if self._closed:
            raise RuntimeError("the executor is closed")
        self._queue.append(job)
        self._dispatch()

    def wait(self, timeout_s: float | None, also: Sequence[int | connection.Connection] = ()) -> list[Outcome]:
        """Outcomes, or nothing when `also` is readable or the time is up; see Executor."""
        deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
        while also or self.unfinished():
            left_s = None if deadline_s is None else max(0.0, deadline_s - time.monotonic())
            pipes = [worker.pipe for worker in self._workers]
            readable = connection.wait([*pipes, *also], 0.0 if self._outcomes else left_s)
            for worker in [w for w in self._workers if w.pipe in readable]:
                self._read(worker)
            self._dispatch()
            expired = deadline_s is not None and time.monotonic() >= deadline_s
            if self._outcomes or expired or any(item in readable for item in also):
                break
        outcomes, self._outcomes = self._outcomes, []
        return outcomes

    def unfinished(self) -> int:
        """Jobs queued, running, or with an outcome that `wait` has not returned."""
        running = sum(worker.job is not None for worker in self._workers)
        return len(self._queue) + running + len(self._outcomes)

    def room(self) -> int:
        """How many more jobs are worth queueing now."""
        # With no worker left still one worker's share: a job submitted then brings back the reason.
        return max(0, JOBS_QUEUED_PER_WORKER * max(1, self._limit_workers) - len(self._queue))

    def cancel_queued(self) -> list[Job]:
        """Take back every job that is not running."""
        jobs = list(self._queue)
        self._queue.clear()
        return jobs

    def close(self) -> None:
        """Kill what works, let idle workers leave."""
        self._stop(kill_idle=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self._stop(kill_idle=raised[0] is not None)

    def _stop(self, *, kill_idle: bool) -> None:
        self._closed = True
        self._queue.clear()
        self._outcomes.clear()
        for worker in self._workers:
            if kill_idle or worker.job is not None or not worker.ready:
                worker.process.kill()
            worker.pipe.close()  # an idle worker leaves at the end of its pipe
        while self._workers:
            worker = self._workers.pop()
            end_worker(worker)
            if worker.job is not None:
                self._budget.give(worker.job.cost_bytes)

    def _fill(self) -> None:
        """Start workers up to the limit."""
        while len(self._workers) < self._limit_workers:
            self._started += 1
            name = f"worker-{self._started}"
            try:
                worker = start_worker(start_context(self._entry), name, self._entry, self._context)
            except (OSError, EOFError) as error:
                self._failed_starts += 1  # tried again: a dying fork server is replaced by then
                if self._failed_starts >= START_ATTEMPTS:
                    message = f"worker processes cannot be started: {error!r}; lower --parallel"
                    self._give_up_start(TaskFailed(message))
            else:
                self._workers.append(worker)

    def _dispatch(self) -> None:
        """Give jobs to idle workers; with no worker left, fail them."""
        if self._broken is not None:
            self._outcomes += [Outcome(j, None, self._broken, os.getpid()) for j in self._queue]
            self._queue.clear()
        for worker in self._workers:
            if not worker.ready or worker.job is not None:
                continue
            job = self._pop_admitted()
            if job is None:
                return
            try:
                worker.pipe.send(Assignment(job.name, job.work))
            except OSError:
                self._queue.appendleft(job)  # it died idle; `wait` will see the end of its pipe
                continue
            self._budget.take(job.cost_bytes)
            worker.job = job

    def _pop_admitted(self) -> Job | None:
        """The first queued job that the budget admits."""
        for position, job in enumerate(self._queue):
            if self._budget.admits(job.cost_bytes):
                del self._queue[position]
                return job
        return None

    def _read(self, worker: WorkerProcess) -> None:
        """Take one reply, or the end of the pipe, from a worker."""
        try:
            reply: Reply = worker.pipe.recv()
        except (EOFError, OSError):
            self._bury(worker)
            return
        if not worker.ready:
            self._greet(worker, reply)
            return
        job, worker.job = worker.job, None
        assert job is not None
        self._budget.give(job.cost_bytes)
        self._outcomes.append(Outcome(job, reply.result, reply.error, worker.pid))

    def _greet(self, worker: WorkerProcess, reply: Reply) -> None:
        """Handle a worker's first reply."""
        if reply.error is None:
            worker.ready = True
            self._failed_starts = 0
            return
        self._workers.remove(worker)
        end_worker(worker)
        self._give_up_start(reply.error)

    def _bury(self, worker: WorkerProcess) -> None:
        """Remove a dead worker, settle its job, and start another where that may help."""
        self._workers.remove(worker)
        pid, job = worker.pid, worker.job
        exit_code = end_worker(worker)
        cause = cause_of_death(exit_code)
        if job is not None:
            self._budget.give(job.cost_bytes)
            self._settle(job, pid, exit_code, cause)
        elif not worker.ready:
            self._failed_starts += 1
            if exit_code >= 0 or self._failed_starts >= START_ATTEMPTS:
                message = f"no worker process gets ready: the last one {cause}; see stderr; a script"
                message += ' must call shardq under `if __name__ == "__main__":`'
                self._give_up_start(TaskFailed(message))
        self._fill()

    def _settle(self, job: Job, pid: int, exit_code: int, cause: str) -> None:
        """Queue the job of a dead worker again, or fail it."""
        self._deaths[job.id] += 1
        deaths = self._deaths[job.id]
        logger.warning("%s: worker %d %s (death %d of this job)", job.name, pid, cause, deaths)
        if exit_code == -signal.SIGKILL and self._limit_workers > 1:
            self._limit_workers -= 1
            logger.warning("going on with %d workers, to need less memory", self._limit_workers)
        if deaths <= RETRIES:
            self._queue.appendleft(job)
            return
        message = f"{job.name}: {deaths} workers died of this task; the last one {cause}"
        self._outcomes.append(Outcome(job, None, TaskFailed(message), pid))

    def _give_up_start(self, error: ShardqError) -> None:
        """Go on with the workers that are there; with none, every job fails with this error."""
        self._limit_workers = len(self._workers)
        logger.warning("a worker did not start, %d are left: %s", self._limit_workers, error)
        if not self._workers:
            self._broken = error
