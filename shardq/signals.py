"""Turn SIGINT and SIGTERM into a flag that a loop can look at and wait for."""

import os
import signal
import threading
from types import FrameType, TracebackType
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

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
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
