"""Threads that work through jobs in order while the run goes on, and tell it when there is news."""

import logging
import os
import queue
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

from shardq.errors import ShardqError, TaskFailed

logger = logging.getLogger(__name__)
Job = TypeVar("Job")
News = TypeVar("News")


class Background(Generic[Job, News]):
    """`ready` is a descriptor that becomes readable when there is something to take.

    `work` makes news of a job, `fail` of a job and the reason why it failed; `describe` says what the job is, as in
    "uploading model.safetensors". `count` is for `work` to call: it adds, and unwinds the job when the run stops.
    """

    def __init__(
        self,
        work: Callable[[Job], News],
        fail: Callable[[Job, ShardqError], News],
        describe: Callable[[Job], str],
        threads: int = 1,
    ) -> None:
        """Begin, with nothing to do; threads come with the first jobs, as a process that has some cannot fork."""
        self._do, self._fail, self._describe = work, fail, describe
        self.moved_bytes = 0  # so far, over all jobs
        self._counting = threading.Lock()
        self._stop = False
        self._todo: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._news: queue.SimpleQueue[News] = queue.SimpleQueue()
        self.ready, self._wake = os.pipe()
        self._limit_threads = threads
        self._threads: list[threading.Thread] = []

    def start(self, job: Job) -> None:
        """Queue a job. Only one thread may call this."""
        self._todo.put(job)
        if len(self._threads) < self._limit_threads:
            self._threads.append(threading.Thread(target=self._work, daemon=True))
            self._threads[-1].start()

    def take(self) -> list[News]:
        """What there is since the last call, in order."""
        news: list[News] = []
        while not self._news.empty():
            news.append(self._news.get())
            os.read(self.ready, 1)
        return news

    def close(self) -> None:
        """Start no more jobs, and wait for the running ones to notice."""
        self._stop = True
        for _ in self._threads:
            self._todo.put(None)
        for t in self._threads:
            t.join()
        os.close(self.ready)
        os.close(self._wake)

    def count(self, count_bytes: int) -> None:
        """Add to `moved_bytes`."""
        if self._stop:
            raise _Stopped
        with self._counting:
            self.moved_bytes += count_bytes

    def _work(self) -> None:
        while (job := self._todo.get()) is not None and not self._stop:
            try:
                news = self._do(job)
            except ShardqError as e:
                news = self._fail(job, e)
            except _Stopped:
                return
            except Exception as e:  # a bug; this thread has to say so, or the run would wait for ever
                doing = self._describe(job)
                logger.exception("%s failed", doing)
                news = self._fail(job, TaskFailed(f"{doing}: {type(e).__name__}: {e}"))
            self._news.put(news)
            os.write(self._wake, b"x")


class _Stopped(Exception):
    """Unwinds a job when the run stops."""
