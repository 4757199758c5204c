"""Makes output files durable: whole ones with their hash, and unfinished ones before a source shard may go."""

import hashlib
import os
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from shardq.files.atomic import pread_exact, sync_way, writing
from shardq.files.writeback import start_writeback
from shardq.tasks import SealTask


def seal_file(path: str, task: SealTask, tile: NDArray[np.uint8]) -> str:
    """fsync and sha256 of a finished file, read into `tile`; the disk writes while the hash runs. Raises DiskFull,
    NotWritable, CorruptShard."""
    digest = hashlib.sha256()
    with writing(path):
        fd = os.open(path, os.O_RDWR)
        try:
            start_writeback(fd)
            for at in range(0, task.size_bytes, tile.size):  # read: page faults of a map cost more than the copy
                part = tile[: min(tile.size, task.size_bytes - at)]
                pread_exact(fd, part.data, at, task.file)
                digest.update(part.data)
            try:
                os.fsync(fd)
            except OSError:
                if not task.keeps:
                    os.unlink(path)  # what is read back may never reach the disk, yet would pass for done
                raise
        finally:
            os.close(fd)
    return digest.hexdigest()


def settle_files(paths: Iterable[str]) -> None:
    """fsync of unfinished files and of their names. Raises DiskFull, NotWritable."""
    for path in paths:
        with writing(path):
            fd = os.open(path, os.O_RDWR)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
            sync_way(os.path.dirname(path))
