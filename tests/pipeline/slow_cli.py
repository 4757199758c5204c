"""The command line, but every task and every file that is published takes SLOW_S seconds longer, so that a test can
meet a run in the middle. Worker processes import this file again, and so are slow, too."""

import os
import time
from unittest.mock import patch

from shardq.publish import _move
from shardq.staging import Staging
from shardq.worker import Report, Worker

SLOW_S = float(os.environ.get("SLOW_S", "0"))


class SlowWorker(Worker):
    """Sleeps, then works."""

    def run(self, work: object) -> Report:
        time.sleep(SLOW_S)
        return super().run(work)


def slow_move(staging: Staging, name: str) -> None:
    time.sleep(SLOW_S)
    _move(staging, name)


patch("shardq.worker.Worker", SlowWorker).start()
patch("shardq.publish._move", slow_move).start()

if __name__ == "__main__":
    from shardq.cli import main

    main()
