"""What an executor is: jobs in, outcomes out, in any order; how a handler is loaded and called."""

import importlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol, Self, TypeVar

from shardq.errors import ShardqError, TaskFailed

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

logger = logging.getLogger(__name__)

T = TypeVar("T")
Handler = Callable[[object], object]

# Enough that no worker waits for the caller, few enough to scan and to take back.
JOBS_QUEUED_PER_WORKER: Final = 2


@dataclass(frozen=True, slots=True)
class Job:
    """One unit of work."""

    id: int
    work: object  # handed to the handler; picklable and small (a few kB): no arrays
    cost_bytes: int  # memory that it holds while it runs
    name: str  # for messages


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a job ended: with a result or with an error, never both."""

    job: Job
    result: object | None
    error: ShardqError | None
    worker_pid: int  # of the process that ran it last; the caller's own when it never started


class Executor(Protocol):
    """Runs jobs. Progress is made inside `submit` and `wait` only; every submitted job ends in one outcome, unless
    `cancel_queued` hands it back or the executor is closed.
    """

    def submit(self, job: Job) -> None:
        """Queue a job. Jobs start in this order; one may overtake only where an earlier one does not fit the byte
        budget. Raises RuntimeError after `close`.
        """

    def wait(self, timeout_s: float | None, also: "Sequence[int | Connection]" = ()) -> list[Outcome]:
        """Block until an outcome is there, an object of `also` is readable, or the time is up (None: no limit).

        Returns at once, empty, when nothing is unfinished and `also` is empty. What goes wrong in a worker comes back
        as an outcome, never as an exception. Signal handlers run inside; for one that only sets a flag to end the wait,
        let it write to a pipe (signal.set_wakeup_fd) and put the read end into `also`.
        """

    def unfinished(self) -> int:
        """Jobs whose outcome `wait` has not returned yet."""

    def room(self) -> int:
        """How many more jobs are worth queueing now; 0 when there are enough for every worker."""

    def cancel_queued(self) -> list[Job]:
        """Take back every job that is not running, in order; they get no outcome."""

    def close(self) -> None:
        """Stop; running jobs are killed and get no outcome. May be called again."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *raised: object) -> None: ...


def load_handler(entry: str, context: object) -> Handler:
    """Import "package.module:function", call it with `context`, return the handler it gives."""
    module_name, _, function_name = entry.partition(":")
    make_handler: Callable[[object], Handler] = getattr(importlib.import_module(module_name), function_name)
    return make_handler(context)


def attempt(name: str, action: Callable[[], T]) -> tuple[T | None, ShardqError | None]:
    """Call `action`; return (result, None) or (None, error).

    A ShardqError keeps its class and message but not its traceback, which would keep the arrays of its frames alive.
    Any other exception becomes TaskFailed and its traceback is logged.
    """
    try:
        return action(), None
    except ShardqError as error:
        return None, type(error)(str(error))
    except Exception as error:
        logger.exception("%s failed", name)
        hint = "; lower --parallel or --max-ram" if isinstance(error, MemoryError) else ""
        text = " ".join(str(error).split())
        return None, TaskFailed(f"{name}: {type(error).__name__}: {text}{hint}")
