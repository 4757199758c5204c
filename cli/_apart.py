"""Work that loads torch, in a process of its own: what that takes of memory ends with it, and is none of the run's."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, TypeVar

from shardq.cli._console import Console
from shardq.errors import TaskFailed

if TYPE_CHECKING:
    from multiprocessing.connection import Connection
    from multiprocessing.context import SpawnProcess

T = TypeVar("T")
LEAVE_S: Final = 10.0  # for a process that was asked to end, before it is killed


def run_apart(console: Console, what: str, less: str, work: Callable[..., T], *words: Any) -> T:
    """What `work(console, *words)` returns in a process of its own, which prints the progress and logs as this one.

    Its ShardqError is raised here, and its other errors as TaskFailed, with their traceback in the log. TaskFailed too
    when it dies; `what` it did and what takes `less` memory are for that message. SIGINT and SIGTERM end it and raise
    Interrupted and Terminated.
    """
    from multiprocessing import get_context

    from shardq.executors.worker_process import cause_of_death
    from shardq.signals import raise_on_signal

    context = get_context("spawn")
    pipe, far_end = context.Pipe()
    process = context.Process(target=_serve, args=(far_end,), name=what)
    try:
        with raise_on_signal(f"{what} was stopped: run the same command again to go on"):
            _start(process)
            far_end.close()
            pipe.send((console, what, work, words))
            result, error = pipe.recv()
    except (EOFError, ConnectionError) as gone:
        process.join()
        died = cause_of_death(process.exitcode or 0, less)
        raise TaskFailed(f"{what}: its process {died}; run the same command again to go on") from gone
    except BaseException:
        _end(process)
        raise
    finally:
        pipe.close()
    process.join()
    if error is not None:
        raise error
    made: T = result
    return made


def _start(process: "SpawnProcess") -> None:
    """Start it with SIGINT held back, as Ctrl-C reaches it too, and would find it before it can ignore that."""
    import signal
    from multiprocessing import resource_tracker

    from shardq.executors.worker_process import safe_path

    with safe_path():
        resource_tracker.ensure_running()  # `start` would, and lets SIGINT through again
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end(process: "SpawnProcess") -> None:
    """Ask it to end; where it computes for longer than LEAVE_S without a look at that, or at a second signal, kill it,
    as whatever it writes can be continued."""
    if process.pid is None:
        return
    try:
        process.terminate()
        process.join(LEAVE_S)
    finally:
        process.kill()
        process.join()


def _serve(pipe: "Connection") -> None:
    """Main function of the process."""
    import signal

    from shardq.errors import Terminated
    from shardq.executors.base import attempt
    from shardq.executors.child import die_with_caller
    from shardq.tune.freeing import return_freed_memory

    def stop(number: int, _frame: object) -> None:
        signal.signal(number, signal.SIG_IGN)  # a group's signal comes twice: here, and as the command's
        raise KeyboardInterrupt  # which no `except Exception` takes

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # what becomes of it is the command's decision
    signal.signal(signal.SIGTERM, stop)
    die_with_caller()
    return_freed_memory()
    try:
        console, what, work, words = pipe.recv()

        def do() -> object:
            console.log.apply()
            return work(console, *words)

        pipe.send(attempt(what, do))
    except KeyboardInterrupt:
        raise SystemExit(Terminated.exit_code) from None
    except (EOFError, ConnectionError):
        return  # the command is gone
