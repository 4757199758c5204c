"""The command line, of which processes are killed where DIE names it: "PLACE WHO".

    block N     tuning of that block begins
    file NAME   half of what goes into that file of the tuned folder is written
    packing     all is tuned, and the first file of the output begins

WHO is `all`, `tuner` (the process that tunes), or `command` (the one that waits for it). The process that tunes imports
this file again. What is killed here is of this command's own process group.
"""

import os
import signal
import time
from pathlib import Path
from typing import Any, NoReturn
from unittest.mock import patch

from shardq.files import atomic
from shardq.worker import Report, Worker

PLACE, _, WHO = os.environ.get("DIE", "").rpartition(" ")
_pwrite_all, _write_atomic = atomic.pwrite_all, atomic.write_atomic


def die() -> NoReturn:
    if WHO == "all":
        os.killpg(0, signal.SIGKILL)
    os.kill(os.getppid() if WHO == "command" else os.getpid(), signal.SIGKILL)
    time.sleep(60)  # it has to be ended by what it was started with
    os._exit(99)


def watch_blocks() -> None:
    from shardq.tune import passes  # in the process that tunes: it takes seconds

    tune = passes.tune_block

    def dying(work: Any, *others: Any) -> Any:
        if f"block {work.index}" == PLACE:
            die()
        return tune(work, *others)

    patch.object(passes, "tune_block", dying).start()


def dying_write(path: Any, *parts: Any) -> None:
    if f"file {Path(path).name}" != PLACE:
        _write_atomic(path, *parts)
        return

    def half(fd: int, buffer: bytes, offset: int) -> NoReturn:
        _pwrite_all(fd, buffer[: len(buffer) // 2], offset)
        die()

    with patch.object(atomic, "pwrite_all", half):
        _write_atomic(path, b"".join(parts))


class DyingWorker(Worker):
    """Dies at its first task."""

    def run(self, work: object) -> Report:
        if PLACE == "packing":
            die()
        return super().run(work)


patch("shardq.tuned.write_atomic", dying_write).start()
patch("shardq.worker.Worker", DyingWorker).start()

if __name__ == "__main__":
    from shardq.cli import main

    main()
else:
    watch_blocks()
