"""The staging folders of a job's workers: each has one for itself, and may find in it what a dead one has left.

A folder is named for the kernel that a worker runs under, since a kernel's locks always hold between its own processes,
whatever the file system: a dead worker's folder is taken up on its own machine only. A worker that was stopped has
given its folder to anybody.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from shardq.errors import OutputLocked
from shardq.files.atomic import writing
from shardq.lock import FolderLock, kernel_id
from shardq.staging import Staging

RELEASED: Final = "released-"


@contextmanager
def own_slot(folder: Path, is_over: Callable[[], bool]) -> Iterator[Staging]:
    """A staging folder below `folder`, locked; at an orderly end given to anybody, or removed when the job is over.

    Raises NotWritable, DiskFull.
    """
    number = 0
    while True:
        place = folder / f"{kernel_id()}-{number}"
        number += 1
        if not place.exists():
            _adopt(folder, place)
        staging = Staging(place)
        staging.make()
        lock = FolderLock(staging.work / "lock")
        try:
            lock.acquire()
        except OutputLocked:
            continue
        try:
            yield staging
        finally:
            if is_over():
                shutil.rmtree(place, ignore_errors=True)
            with suppress(OSError):  # it is gone, with the whole job
                place.rename(folder / f"{RELEASED}{os.urandom(4).hex()}")
            lock.release()
        return


def _adopt(folder: Path, place: Path) -> None:
    """Take up what a worker has left that was stopped."""
    with writing(folder):
        for left in sorted(folder.glob(f"{RELEASED}*")):
            with suppress(OSError):  # another was faster
                left.rename(place)
                return
