"""Lets a caller stop work that blocks on the network, within a fraction of a second."""

import logging
import threading
from collections.abc import Callable
from typing import Final

from shardq.destinations.base import OnBytes

logger = logging.getLogger(__name__)
TICK_S: Final = 0.2
THREAD: Final = "shardq-upload"


class AbandonedError(Exception):
    """Unwinds work that nobody waits for any more."""


class Meter:
    """Bytes counted in the working thread, read in the caller's."""

    def __init__(self) -> None:
        self.bytes = 0
        self._abandoned = False

    def add(self, count: int) -> None:
        """Count bytes, or take them back. Raises AbandonedError when the caller has gone."""
        if self._abandoned:
            raise AbandonedError
        self.bytes += count

    def abandon(self) -> None:
        """Make the next `add` raise."""
        self._abandoned = True


def run_watched(work: Callable[[Meter], None], on_bytes: OnBytes, on_stop: Callable[[], None] | None = None) -> None:
    """Run `work` in a thread of its own; tell `on_bytes` here what it counts, every TICK_S at least.

    What `work` raises is raised here; RuntimeError if it was killed without a word. When `on_bytes` raises, `on_stop`
    is called and the thread is left to notice, at the latest when the network's timeout comes: a blocked socket cannot
    be woken safely from outside.
    """
    meter = Meter()
    failures: list[Exception] = []
    finished: list[bool] = []

    def run() -> None:
        try:
            work(meter)
            finished.append(True)
        except Exception as error:  # raised again below, in the caller's thread
            logger.debug("an upload ended early", exc_info=True)
            failures.append(error)

    thread = threading.Thread(target=run, name=THREAD, daemon=True)
    thread.start()
    told = 0
    try:
        ended = False
        while not ended:
            thread.join(TICK_S)
            ended = not thread.is_alive()
            now = meter.bytes
            on_bytes(now - told)
            told = now
    except BaseException:
        meter.abandon()
        if on_stop is not None:
            on_stop()
        raise
    if failures:
        raise failures[0]
    if not finished:
        raise RuntimeError("the working thread was interrupted")
