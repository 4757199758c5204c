"""Claims: who works on what, in a folder that all workers see and no server watches.

A claim is a file `UNIT.GENERATION`, made with O_EXCL, so that one of many gets it. Its owner renews it by its
modification time; one that was not renewed for long is taken over by making the next generation, which again one of
many can do. Files are never renamed or removed, so that nobody takes away a claim that he has not seen.

A claim saves work and decides nothing: all who make a file make the same bytes, and publishing is safe without claims.
"""

import errno
import json
import logging
import os
import socket
import threading
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Final, Self

from shardq.files.atomic import pwrite_all, writing

logger = logging.getLogger(__name__)

BEATS: Final = 5  # renewals in the time after which a claim counts as left
_CLOCK: Final = ".clock-"  # begins the name of a worker's own file, which tells the server's time, and that it lives
RELEASED_S: Final = 0  # modification time of a claim that was given back
_NO_TIMES: Final = frozenset({errno.ENOSYS, errno.ENOTSUP, errno.EPERM, errno.EINVAL})


class Claims:
    """The claims of one worker; entered, a thread renews them."""

    def __init__(self, folder: Path, stale_s: float) -> None:
        self._folder, self._stale_s = folder, stale_s
        self._owner = f"{socket.gethostname()}-{os.getpid()}-{os.urandom(4).hex()}"
        self._clock = folder / f"{_CLOCK}{self._owner}"
        self._held: dict[str, Path] = {}
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._renew_all, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self._ended.set()
        self._thread.join()
        for unit in tuple(self._held):
            self.release(unit)
        with suppress(OSError):
            self._clock.unlink()

    def take(self, units: Iterable[str], most: int) -> list[str]:
        """Claim the first of `units` that are free or were left, at most so many. Raises NotWritable."""
        taken: list[str] = []
        with writing(self._folder):
            latest, now_s = self._latest(), self._now_s()
            for unit in units:
                if len(taken) == most:
                    break
                if self._take(unit, latest.get(unit), now_s):
                    taken.append(unit)
        return taken

    def workers(self) -> int:
        """How many are alive, this one included. Raises NotWritable."""
        with writing(self._folder):
            now_s, alive = self._now_s(), 0
            for path in self._folder.glob(f"{_CLOCK}*"):
                with suppress(FileNotFoundError):  # it has ended
                    alive += now_s - _renewed_s(path) <= self._stale_s
        return alive

    def release(self, unit: str) -> None:
        """Give a claim back: it may be taken at once."""
        with self._lock:
            path = self._held.pop(unit, None)
        if path:
            with suppress(OSError):  # else it is taken over when it is old enough
                os.utime(path, (RELEASED_S, RELEASED_S))

    def drop(self, unit: str) -> None:
        """What was claimed is done: the claim is of no more use to anybody."""
        with self._lock:
            self._held.pop(unit, None)

    def _take(self, unit: str, generation: int | None, now_s: float) -> bool:
        renewed_s = None if generation is None else _renewed_s(self._folder / f"{unit}.{generation}")
        if renewed_s is not None and now_s - renewed_s <= self._stale_s:
            return False
        path = self._folder / f"{unit}.{0 if generation is None else generation + 1}"
        try:
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            return False
        try:
            pwrite_all(fd, json.dumps({"owner": self._owner}).encode(), 0)
        finally:
            os.close(fd)
        if renewed_s is not None and renewed_s != RELEASED_S:
            logger.warning("%s: taken over, as its claim was not renewed for %g s", unit, now_s - renewed_s)
        with self._lock:
            self._held[unit] = path
        return True

    def _latest(self) -> dict[str, int]:
        """The generation of each claim that counts."""
        latest: dict[str, int] = {}
        for name in os.listdir(self._folder):
            unit, _, generation = name.rpartition(".")
            if unit and generation.isdigit():
                latest[unit] = max(latest.get(unit, 0), int(generation))
        return latest

    def _now_s(self) -> float:
        """By the clock that stamps the claims, which is the file server's: that of an own file, just written."""
        fd = os.open(self._clock, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            pwrite_all(fd, b"x", 0)
            os.fsync(fd)
            return os.fstat(fd).st_mtime
        finally:
            os.close(fd)

    def _renew_all(self) -> None:
        while not self._ended.wait(self._stale_s / BEATS):
            with self._lock:
                paths = (self._clock, *self._held.values()) if self._clock.exists() else ()
            for path in paths:
                try:
                    _renew(path)
                except OSError as error:  # the worker goes on: at worst another makes the same file
                    logger.warning("%s: cannot be renewed (%s)", path, error)


def _renewed_s(path: Path) -> float:
    """When a claim was renewed last."""
    fd = os.open(path, os.O_RDONLY)  # opened, so that a network file system asks its server
    try:
        return os.fstat(fd).st_mtime
    finally:
        os.close(fd)


def _renew(path: Path) -> None:
    """Set the modification time by the server's clock; where that cannot be, by writing the content again."""
    try:
        os.utime(path)
    except OSError as error:
        if error.errno not in _NO_TIMES:
            raise
        content = path.read_bytes()
        fd = os.open(path, os.O_WRONLY)
        try:
            pwrite_all(fd, content, 0)
            os.fsync(fd)
        finally:
            os.close(fd)
