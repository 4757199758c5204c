"""One worker process as the supervisor sees it: start it, end it, say why it died."""

import contextlib
import gc
import importlib
import logging
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing import connection
from multiprocessing.context import (
    ForkContext,
    ForkProcess,
    ForkServerContext,
    ForkServerProcess,
    SpawnContext,
    SpawnProcess,
)
from pathlib import Path
from typing import Final

from shardq.executors.base import Job
from shardq.executors.child import PRELOAD, serve, serve_forked

logger = logging.getLogger(__name__)

SAFE_PATH: Final = "PYTHONSAFEPATH"  # read by Python 3.11 and later when it starts
TASKS: Final = Path("/proc/self/task")  # a folder for each thread of this process, Python's or not; Linux
CHILD_MAIN: Final = "__mp_main__"  # what multiprocessing calls the main script in a child that imports it again
Context = ForkContext | ForkServerContext | SpawnContext
Process = ForkProcess | ForkServerProcess | SpawnProcess
EXIT_WAIT_S: Final = 5.0  # for a process that has closed its pipe or has been killed


@dataclass(slots=True)
class WorkerProcess:
    """A process, the supervisor's end of its pipe, and what it is doing."""

    process: Process
    pipe: connection.Connection
    ready: bool = False  # the handler is built
    job: Job | None = None

    @property
    def pid(self) -> int:
        """Process id; 0 when it never started."""
        return self.process.pid or 0


def start_context(entry: str) -> Context:
    """The start method: a fork of this process where that is safe, else a fork server that has loaded the entry's
    module, or spawn where there is none.

    A program whose own fork server is running already keeps that one: workers then start more slowly.
    """
    if _may_fork():
        importlib.import_module(entry.partition(":")[0])  # once, for all workers
        gc.freeze()  # what is there stays: workers need not look at it, nor have pages of their own for that
        return multiprocessing.get_context("fork")
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([PRELOAD, serve.__module__, entry.partition(":")[0]])
    return context


def _may_fork() -> bool:
    """True in a process of our own, as the command line's, that has no other thread: locks that a thread holds stay
    locked in a fork for good. A fork server costs 0.2 CPU-s a run, as it loads again all that is loaded here."""
    main = sys.modules.get(CHILD_MAIN)  # in other processes that is the main script itself, with its own name
    is_ours = PRELOAD in sys.modules and main is not None and main.__name__ != CHILD_MAIN
    return is_ours and TASKS.is_dir() and sum(1 for _ in TASKS.iterdir()) == 1


def start_worker(start: Context, name: str, entry: str, context: object) -> WorkerProcess:
    """Start a process that builds the handler and then serves. Raises OSError or EOFError when it cannot."""
    pipe, far_end = start.Pipe()
    target = serve_forked if isinstance(start, ForkContext) else serve
    process = start.Process(target=target, args=(far_end, entry, context), name=name, daemon=True)
    try:
        with safe_path():
            process.start()
    except (OSError, EOFError):
        pipe.close()
        raise
    finally:
        far_end.close()  # so that the pipe ends when the worker does
    return WorkerProcess(process, pipe)


@contextlib.contextmanager
def safe_path() -> Iterator[None]:
    """Keep the current folder off the module path of the fork server, which is started by this: it runs `python -c`, so
    that a folder `shardq` or a file `logging.py` where the user happens to be would be imported."""
    before = os.environ.get(SAFE_PATH)
    os.environ[SAFE_PATH] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[SAFE_PATH]
        else:
            os.environ[SAFE_PATH] = before


def end_worker(worker: WorkerProcess) -> int:
    """Wait for a worker that has been killed or whose pipe is at its end; return its exit code.

    One that is still there after EXIT_WAIT_S is killed.
    """
    worker.pipe.close()
    worker.process.join(EXIT_WAIT_S)
    if worker.process.exitcode is None:
        logger.warning("worker %d did not leave within %g s: killed", worker.pid, EXIT_WAIT_S)
        worker.process.kill()
        worker.process.join()
    exit_code = worker.process.exitcode
    assert exit_code is not None
    worker.process.close()
    return exit_code


def cause_of_death(exit_code: int, less: str = "lower --parallel or --max-ram") -> str:
    """What an exit code says, as the end of a sentence; negative means a signal. `less`: what takes less memory."""
    if exit_code == -signal.SIGKILL:
        return f"was killed (signal 9), likely out of memory: {less}"
    if exit_code >= 0:
        return f"left with exit code {exit_code}"
    text = f"died of signal {-exit_code} ({signal.strsignal(-exit_code)})"
    if -exit_code == signal.SIGBUS:
        return text + ": a file was cut while it was read, or its disk failed"
    if -exit_code in (signal.SIGSEGV, signal.SIGILL, signal.SIGFPE, signal.SIGABRT):
        return text + ", a fault in native code: report it; SHARDQ_KERNELS=baseline may avoid it"
    return text
