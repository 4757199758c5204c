"""What runs inside a worker process: read an assignment, call the handler, write a reply.

The first reply tells whether the handler could be built; then comes one for each assignment.
"""

import contextlib
import ctypes
import gc
import importlib
import logging
import multiprocessing
import os
import pickle
import signal
import sys
import threading
from dataclasses import dataclass
from functools import partial
from multiprocessing import connection
from typing import Final

from shardq.errors import ShardqError
from shardq.executors.base import Handler, attempt, load_handler

logger = logging.getLogger(__name__)

PRELOAD: Final = "shardq.executors.preload"
PR_SET_PDEATHSIG: Final = 1  # from linux/prctl.h
EXIT_ORPHANED: Final = 3
DESCRIPTORS: Final = "/proc/self/fd"  # the open files of this process; Linux


@dataclass(frozen=True, slots=True)
class Assignment:
    """One piece of work on its way to a worker."""

    name: str
    work: object


@dataclass(frozen=True, slots=True)
class Reply:
    """What a worker answers: a result or an error."""

    result: object | None
    error: ShardqError | None


def serve_forked(pipe: connection.Connection, entry: str, context: object) -> None:
    """`serve` in a fork of the caller. What the caller had open is not to be kept open by this: locks would outlive it,
    and pipes not end with it."""
    caller = multiprocessing.parent_process()
    assert caller is not None
    _forget_files({0, 1, 2, pipe.fileno(), caller.sentinel})
    serve(pipe, entry, context)


def serve(pipe: connection.Connection, entry: str, context: object) -> None:
    """Main function of a worker; returns at the end of the pipe.

    For entry and context see `load_handler`.
    """
    # Ctrl-C reaches the whole process group; what happens then is the caller's decision.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _die_with_fork_server()
    die_with_caller()
    importlib.import_module(PRELOAD)  # known already where our fork server made this process
    handler, error = attempt("worker start", partial(load_handler, entry, context))
    gc.freeze()  # what is loaded stays
    try:
        pipe.send(Reply(None, error))
        while handler is not None:
            assignment: Assignment = pipe.recv()
            answer = partial(_pickled_reply, handler, assignment.work)
            pickled, error = attempt(assignment.name, answer)
            if pickled is None:
                pipe.send(Reply(None, error))
            else:
                pipe.send_bytes(pickled)
    except (EOFError, ConnectionError):
        return  # the caller closed its end


def _pickled_reply(handler: Handler, work: object) -> bytes:
    """The reply as `pipe.send` writes it: a result that cannot be pickled fails its job only."""
    return pickle.dumps(Reply(handler(work), None), pickle.HIGHEST_PROTOCOL)


def _forget_files(kept: set[int]) -> None:
    """Let every other descriptor be one of nothing. They are not closed, as the objects that own them may close them
    yet: that must not meet a file that got the same number."""
    nothing = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    for fd in {int(name) for name in os.listdir(DESCRIPTORS)} - kept - {nothing}:
        with contextlib.suppress(OSError):  # the descriptor of the listing itself is gone
            os.fstat(fd)
            os.dup2(nothing, fd, inheritable=False)
    os.close(nothing)


def die_with_caller() -> None:
    """Leave at once when the caller's process is gone, also in the middle of a job.

    The end of the pipe alone would be seen only after the job, and a new run may hold the folder's lock by then.
    """
    caller = multiprocessing.parent_process()
    assert caller is not None

    def watch(sentinel: int) -> None:
        connection.wait([sentinel])
        os._exit(EXIT_ORPHANED)

    threading.Thread(target=watch, args=(caller.sentinel,), name="caller", daemon=True).start()


def _die_with_fork_server() -> None:
    """The fork server reports how its workers ended: without it a live one would look dead.

    Linux only. The parent of this process is the fork server, so this does not cover the caller where there is one.
    """
    if sys.platform != "linux":
        return
    if ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        logger.warning("prctl refused: this worker may outlive the fork server")
