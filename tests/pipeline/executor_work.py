"""Handlers for test_executors.py, in a module that workers can import."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np  # it starts threads unless told not to

from shardq.errors import CorruptShard, KernelUnavailable

Handler = Callable[[object], object]


def start(context: object) -> Handler:
    """A handler for work of the form (action, argument); it knows its context."""

    def handle(work: object) -> object:
        assert isinstance(work, tuple)
        action, argument = work
        return ACTIONS[action](argument, context)

    return handle


def start_refused(context: object) -> Handler:
    raise KernelUnavailable(f"no kernels for {context}")


def start_with_bug(context: object) -> Handler:
    raise LookupError("no such\nthing")


def start_dying(context: object) -> Handler:
    os._exit(7)


def start_dying_once(context: object) -> Handler:
    assert isinstance(context, str)
    _first_time(context, lambda: os.kill(os.getpid(), signal.SIGKILL))
    return start(None)


def _first_time(marker: str, action: Callable[[], object]) -> None:
    try:
        Path(marker).touch(exist_ok=False)
    except FileExistsError:
        return
    action()


def _echo(argument: object, context: object) -> object:
    return argument


def _context(argument: object, context: object) -> object:
    return context


def _sleep(argument: object, context: object) -> object:
    assert isinstance(argument, float)
    time.sleep(argument)
    return argument


def _span(argument: object, context: object) -> object:
    """When the job began and ended, on the clock that processes share."""
    began_s = time.monotonic()
    _sleep(argument, context)
    return began_s, time.monotonic()


def _die(argument: object, context: object) -> object:
    assert isinstance(argument, int)
    os.kill(os.getpid(), argument)
    time.sleep(60)
    return None


def _die_once(argument: object, context: object) -> object:
    assert isinstance(argument, str)
    _first_time(argument, lambda: os.kill(os.getpid(), signal.SIGKILL))
    return "survived"


def _leave(argument: object, context: object) -> object:
    assert isinstance(argument, int)
    sys.exit(argument)


def _bug(argument: object, context: object) -> object:
    raise ValueError("bad\ntensor")


def _no_memory(argument: object, context: object) -> object:
    raise MemoryError


def _refuse(argument: object, context: object) -> object:
    raise CorruptShard("model-1.safetensors: header lies; get the file again")


def _unpicklable(argument: object, context: object) -> object:
    return lambda: None


def _surroundings(argument: object, context: object) -> object:
    return {
        "threads": os.environ["OMP_NUM_THREADS"],
        "sigint_ignored": signal.getsignal(signal.SIGINT) is signal.SIG_IGN,
        "sigterm_default": signal.getsignal(signal.SIGTERM) is signal.SIG_DFL,
        "loaded": [m for m in ("torch", "huggingface_hub", "click", "rich") if m in sys.modules],
        "native_threads": len(os.listdir("/proc/self/task")) if sys.platform == "linux" else None,
        "numpy": np.__name__,
        "python_threads": threading.active_count(),
    }


def _parent(argument: object, context: object) -> object:
    return os.getppid()


ACTIONS = {
    "echo": _echo,
    "context": _context,
    "sleep": _sleep,
    "span": _span,
    "die": _die,
    "die_once": _die_once,
    "leave": _leave,
    "bug": _bug,
    "no_memory": _no_memory,
    "refuse": _refuse,
    "unpicklable": _unpicklable,
    "surroundings": _surroundings,
    "parent": _parent,
}
