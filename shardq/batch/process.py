"""The process of an errand, from outside: start it, hear its steps, stop it, say how it ended."""

import multiprocessing
import os
import signal
from collections.abc import Callable
from multiprocessing import connection

from shardq.batch.errand import Errand, Made, Message, serve_errand
from shardq.batch.schedule import CRASHED
from shardq.batch.state import Trouble
from shardq.executors.worker_process import cause_of_death, safe_path
from shardq.progress import Progress
from shardq.signals import StopFlag


def do_errand(errand: Errand, report: Callable[[Progress], None], stop: StopFlag) -> tuple[Made, ...]:
    """What became of each entry. A process that dies without a word has crashed with all of them.

    When `stop` is set the process is asked to end, which it does as a run that is stopped does.
    """
    context = multiprocessing.get_context("spawn")
    pipe, far_end = context.Pipe(duplex=False)
    process = context.Process(target=serve_errand, args=(far_end, errand), name="errand")
    with safe_path():
        process.start()
    far_end.close()
    told = False
    try:
        while True:
            waited: list[connection.Connection | int] = [pipe] if told else [pipe, stop.ready]
            if stop.ready in connection.wait(waited):
                told = True
                if process.pid:
                    os.kill(process.pid, signal.SIGTERM)
                continue
            message: Message = pipe.recv()
            if not isinstance(message, Progress):
                return message
            report(message)
    except (EOFError, ConnectionError):
        process.join()
        text = f"its process {cause_of_death(process.exitcode or 0)}"
        return tuple(Made(e.label, trouble=Trouble(CRASHED, text)) for e in errand.entries)
    finally:
        pipe.close()
        process.join()
        process.close()
