"""Makes output files durable: whole ones with their hash, and unfinished ones before a source shard may go."""

import os
from collections.abc import Iterable, Sequence
from contextlib import ExitStack

import numpy as np
from numpy.typing import NDArray

from shardq.files.atomic import pread_exact, sync_way, writing
from shardq.files.direct import BLOCK_BYTES, DirectDisk, whole_blocks
from shardq.files.writeback import start_writeback
from shardq.kernels.sha256 import new_digest, update_all
from shardq.tasks import Unsealed


def seal_files(paths: Sequence[str], files: Sequence[Unsealed], room: NDArray[np.uint8], disk: DirectDisk) -> list[str]:
    """fsync and sha256 of finished files, read into `room` side by side; the disk writes while the hashes run. Raises
    DiskFull, NotWritable, CorruptShard."""
    digests = [new_digest() for _ in files]
    part_bytes = room.size // len(files) // BLOCK_BYTES * BLOCK_BYTES
    with ExitStack() as opened:
        fds = [_open(path, opened) for path in paths]
        for at in range(0, max(f.size_bytes for f in files), part_bytes):
            parts = []
            for number, (fd, file) in enumerate(zip(fds, files, strict=True)):  # a map's faults cost more than the copy
                part = room[number * part_bytes :][: max(0, min(part_bytes, file.size_bytes - at))]
                done = disk.read(fd, room[number * part_bytes :][: whole_blocks(part.size)], at)
                pread_exact(fd, part[done:].data, at + done, file.file)
                parts.append(part.data)
            update_all(digests, parts)
        for path, fd, file in zip(paths, fds, files, strict=True):
            _make_durable(path, fd, file)
    return [digest.hexdigest() for digest in digests]


def _open(path: str, opened: ExitStack) -> int:
    """A descriptor of a file that the disk begins to write; closed with `opened`."""
    with writing(path):
        fd = os.open(path, os.O_RDWR)
        opened.callback(os.close, fd)
        start_writeback(fd)
    return fd


def _make_durable(path: str, fd: int, file: Unsealed) -> None:
    with writing(path):
        try:
            os.fsync(fd)
        except OSError:
            if not file.keeps:
                os.unlink(path)  # what is read back may never reach the disk, yet would pass for done
            raise


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
