"""How fast bytes may come or go, for all threads that share a pace together."""

import threading
import time
from collections.abc import Callable
from typing import Final

_TICK_S: Final = 0.25


def ignore_tick() -> None:
    """For those who need not be asked while something waits."""


def sleep_ticking(wait_s: float, tick: Callable[[], None]) -> None:
    """Sleep, calling `tick` at least every quarter of a second; what it raises ends the sleep."""
    ends_at = time.monotonic() + wait_s
    while (left_s := ends_at - time.monotonic()) > 0:
        tick()
        time.sleep(min(left_s, _TICK_S))


class Pace:
    """At most so many bytes in a second, on the average of a moment; time in which nothing moved is not made up for."""

    def __init__(self, bytes_s: int | None = None) -> None:
        """None: as fast as it goes."""
        self._bytes_s = bytes_s
        self._lock = threading.Lock()
        self._paid_at = 0.0  # when the bytes that have passed are paid for

    def took(self, count: int, tick: Callable[[], None] = ignore_tick) -> None:
        """Bytes have passed: return when more may, calling `tick` meanwhile, which may raise."""
        if self._bytes_s is None:
            return
        with self._lock:
            now = time.monotonic()
            self._paid_at = max(self._paid_at, now) + count / self._bytes_s
            wait_s = self._paid_at - now
        sleep_ticking(wait_s, tick)
