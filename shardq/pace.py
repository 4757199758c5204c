"""How fast bytes may come or go, for all threads that share a pace together."""

import threading
import time
from collections.abc import Callable

from shardq.sources.hub_errors import ignore_tick, sleep_ticking


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
