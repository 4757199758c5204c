"""Turn SIGINT and SIGTERM into a flag that a loop can look at and wait for, or into an error."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Final, Self

from shardq.errors import Interrupted, Terminated

SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)


class StopFlag:
    """While entered, the first signal sets `signal` and makes `ready` readable; a second one acts as it did before.

    Outside the main thread signals cannot be caught, and the flag is never set.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self.ready, self._wake = os.pipe()
        self._before: dict[int, signal._HANDLER] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {s: signal.signal(s, self._catch) for s in SIGNALS}
        return self

    def __exit__(self, *raised: object) -> None:
        self._restore()
        os.close(self.ready)
        os.close(self._wake)

    def heed(self, state: str) -> None:
        """End the run if a signal has come; `state`: what is done, what to do. Raises Interrupted, Terminated."""
        if self.signal is not None:
            kind = Terminated if self.signal == signal.SIGTERM else Interrupted
            raise kind(f"stopped; {state}")

    def _catch(self, number: int, _frame: FrameType | None) -> None:
        self.signal = number
        os.write(self._wake, b"x")
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}


@contextlib.contextmanager
def raise_on_signal(message: str) -> Iterator[None]:
    """While entered, the first signal raises Interrupted or Terminated with `message`, wherever the main thread is: for
    work that may be cut off at any point. A second signal acts as it did before.

    Outside the main thread signals cannot be caught, and nothing is raised.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before: dict[int, signal._HANDLER] = {}

    def restore() -> None:
        while before:
            signal.signal(*before.popitem())

    def catch(number: int, _frame: FrameType | None) -> None:
        restore()
        raise (Terminated if number == signal.SIGTERM else Interrupted)(message)

    before |= {s: signal.signal(s, catch) for s in SIGNALS}
    try:
        yield
    finally:
        restore()
