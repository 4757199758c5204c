"""A command whose work is done in a process apart: prints that it has begun, and then does what its argument says."""

import contextlib
import logging
import os
import signal
import sys
import time

import click

from shardq.cli._apart import run_apart
from shardq.cli._command import ShardqCommand, output_options
from shardq.cli._console import Console
from shardq.errors import BudgetTooSmall

WAIT_S = 120.0  # it has to be ended by what it was started with


def work(_console: Console, deed: str) -> list[int]:
    blocked = signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, ())
    print("begun", os.getpid(), "SIGINT blocked:", blocked, flush=True)
    logging.getLogger("shardq.work").info("a word of the work")
    if deed == "refuse":
        raise BudgetTooSmall("too small: 3 bytes")
    if deed == "fail":
        raise ValueError("a bug,\nin two lines")
    if deed == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if deed in ("wait", "compute"):
        if deed == "compute":  # as native code does, which looks at no signal before it ends; a mask is one thread's
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        with contextlib.suppress(Exception):
            try:
                print("waiting", flush=True)
                time.sleep(WAIT_S)
            finally:
                time.sleep(0.2)  # a second signal would cut this off
                print("left in order", flush=True)
        print("took the signal for an error", flush=True)
    return list(range(100_000))  # more than a pipe holds


@click.command("apart", cls=ShardqCommand)
@click.argument("deed")
@output_options
@click.pass_obj
def command(console: Console, deed: str) -> None:
    made = run_apart(console, "counting", "count to less", work, deed)
    print(len(made), [m for m in ("torch", "concurrent.futures") if m in sys.modules])


if __name__ == "__main__":
    command()
