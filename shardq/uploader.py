"""Uploads finished files while others are still being made, one at a time, in order."""

import logging
import os
import queue
import threading
from dataclasses import dataclass
from pathlib import Path

from shardq.destinations.base import Destination, StoredFile
from shardq.errors import ShardqError, TaskFailed

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Uploaded:
    """A file whose content is stored, or the reason why it is not."""

    file: StoredFile
    error: ShardqError | None


class Uploader:
    """Sends files on a background thread. `ready` is a descriptor that becomes readable when one is done."""

    def __init__(self, destination: Destination) -> None:
        self._destination = destination
        self.uploaded_bytes = 0  # so far, over all files
        self._submitted_bytes = self._done_bytes = 0
        self._stop = False
        self._todo: queue.SimpleQueue[tuple[Path, StoredFile] | None] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[Uploaded] = queue.SimpleQueue()
        self.ready, self._wake = os.pipe()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    @property
    def waiting_bytes(self) -> int:
        """Of the files that were submitted and are not done: what must stay on the disk."""
        return self._submitted_bytes - self._done_bytes

    def submit(self, path: Path, file: StoredFile) -> None:
        """Send the content of `path` after all that was submitted before."""
        self._submitted_bytes += file.size_bytes
        self._todo.put((path, file))

    def take(self) -> list[Uploaded]:
        """What is done since the last call, in order."""
        done: list[Uploaded] = []
        while not self._done.empty():
            done.append(self._done.get())
            self._done_bytes += done[-1].file.size_bytes
            os.read(self.ready, 1)
        return done

    def close(self) -> None:
        """Send no more, and wait for a running upload to notice."""
        self._stop = True
        self._todo.put(None)
        self._thread.join()
        os.close(self.ready)
        os.close(self._wake)

    def _count(self, count: int) -> None:
        if self._stop:
            raise _Stopped
        self.uploaded_bytes += count

    def _work(self) -> None:
        while (item := self._todo.get()) is not None and not self._stop:
            path, file = item
            try:
                self._destination.upload(path, file, self._count)
                done = Uploaded(file, None)
            except ShardqError as e:
                done = Uploaded(file, e)
            except _Stopped:
                return
            except Exception as e:  # a bug; this thread has to say so, or the run would wait for ever
                logger.exception("uploading %s failed", file.name)
                done = Uploaded(file, TaskFailed(f"uploading {file.name}: {type(e).__name__}: {e}"))
            self._done.put(done)
            os.write(self._wake, b"x")


class _Stopped(Exception):
    """Unwinds an upload when the run stops."""
