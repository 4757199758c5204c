"""How many workers of a job make how much of it: on simulated links and disks, and on paper for a large one.

Usage: python bench/scaling.py [--workers 1,2,4,8] [--files 48] [--link 4] [--json FILE]
       python bench/scaling.py --paper

The first runs real workers (`shardq worker`, one process each) on this machine. What would be slow is simulated: every
task waits as long as its source bytes take on a node's own link, and, in a queue that all workers share, on the link of
the store; every file waits as long as its bytes take on a node's disk. The model is in bench/README.md.
The second computes the same for 1,000 files on up to 64 nodes, with the batches that workers really claim.
"""

import argparse
import fcntl
import json
import os
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from unittest.mock import patch

from checkpoints import write_layers

from shardq.nodes.working import batch_files
from shardq.tasks import Bundle, SealTask
from shardq.worker import Report, Worker

NODE_BPS: Final = "SHARDQ_BENCH_NODE"  # bytes a second of a node's own link
LINK_BPS: Final = "SHARDQ_BENCH_LINK"  # and of the store's
DISK_BPS: Final = "SHARDQ_BENCH_DISK"  # and of a node's disk
QUEUE: Final = "SHARDQ_BENCH_QUEUE"  # a file with the time when the store's link is free again
DISK_SHARE: Final = 0.25  # of the time of a file, of one worker
OUTPUT_SHARE: Final = 0.28  # bytes of the output, of those of the source
STEP_S: Final = 0.25  # of the model on paper
START_S: Final = 0.5  # before all processes wait at the start
GB: Final = 1e9


# --- real workers ----------------------------------------------------------------------------------------------------


class SlowWorker(Worker):
    """Waits as the node and the store would."""

    def run(self, work: object) -> Report:
        """Wait, then work."""
        if isinstance(work, Bundle):
            _wait_for_source(work.source_bytes)
        elif isinstance(work, SealTask):
            time.sleep(sum(f.size_bytes for f in work.files) / float(os.environ[DISK_BPS]))
        return super().run(work)


def _wait_for_source(count_bytes: int) -> None:
    """Until these bytes have come: at a node's rate, and behind what others have asked the store for."""
    now_s = time.monotonic()
    with open(os.environ[QUEUE], "r+b") as queue:
        fcntl.flock(queue, fcntl.LOCK_EX)
        (free_s,) = struct.unpack("d", queue.read(8))
        free_s = max(free_s, now_s) + count_bytes / float(os.environ[LINK_BPS])
        queue.seek(0)
        queue.write(struct.pack("d", free_s))
    time.sleep(max(free_s, now_s + count_bytes / float(os.environ[NODE_BPS])) - now_s)


def be_worker(job: Path, source: Path, gate: Path, rank: str) -> None:
    """One worker, that begins when the gate opens: imports do not count."""
    import shardq
    from shardq.nodes import calls

    patch("shardq.worker.Worker", SlowWorker).start()
    (gate.parent / f"here-{rank.replace('/', '-')}").touch()
    while not gate.exists():
        time.sleep(0.01)
    calls.work(calls.begin_job(job, source, "W4A16"), worker=rank, limits=shardq.Limits(parallel=1))


def run_workers(source: Path, count: int, environment: dict[str, str]) -> float:
    """Seconds from the start of all workers to the complete output."""
    with tempfile.TemporaryDirectory() as folder:
        top = Path(folder)
        gate, queue = top / "gate", top / "queue"
        queue.write_bytes(struct.pack("d", 0.0))
        own = {**os.environ, **environment, QUEUE: str(queue)}
        words = [sys.executable, __file__, "--work", str(top / "job"), str(source), str(gate)]
        started = [subprocess.Popen([*words, f"{n}/{count}"], env=own) for n in range(count)]
        while len(list(top.glob("here-*"))) < count:
            time.sleep(0.05)
        time.sleep(START_S)
        gate.touch()
        began_s = time.monotonic()
        while not (top / "job" / "complete.json").exists():
            time.sleep(0.01)
        elapsed_s = time.monotonic() - began_s
        for process in started:
            if process.wait():
                raise SystemExit(f"worker {process.args} failed")
        return elapsed_s


def measure(counts: Sequence[int], files: int, link: float, file_s: float, work: Path) -> list[dict[str, Any]]:
    """A row for each count of workers; `link`: the store's in units of a node's."""
    source = write_layers(work / f"layers{files}", files)
    size_bytes = sum(p.stat().st_size for p in source.glob("*.safetensors")) / files
    node_bps = size_bytes / (file_s * (1 - DISK_SHARE))
    environment = {
        NODE_BPS: str(node_bps),
        LINK_BPS: str(link * node_bps),
        DISK_BPS: str(OUTPUT_SHARE * size_bytes / (file_s * DISK_SHARE)),
    }
    rows: list[dict[str, Any]] = []
    for count in counts:
        elapsed_s = run_workers(source, count, environment)
        alone_s = rows[0]["seconds"] * rows[0]["workers"] if rows else elapsed_s * count
        rows.append(_row(count, elapsed_s, alone_s, link / (1 - DISK_SHARE)))  # a node is on its disk for a while
    return rows


def _row(count: int, elapsed_s: float, alone_s: float, full: float) -> dict[str, Any]:
    """`full`: workers that fill the link."""
    times = alone_s / elapsed_s
    return {"workers": count, "seconds": elapsed_s, "times": times, "share": times / min(count, full)}


# --- on paper --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Model:
    """What nodes and store can do, and what a job costs."""

    files: int = 1000
    file_bytes: float = 5 * GB  # of source
    node_bps: float = 0.25 * GB
    store_bps: float = 8 * GB
    make_s: float = 6.0  # of a file that is there: kernels on 8 cores, and writing, hashing and syncing the output
    batch_s: float = 1.0  # of claims, journal and worker processes
    end_s: float = 20.0  # headers and plan, ledger, renames
    ahead: int = 3  # files that are fetched before they are made

    @property
    def full(self) -> float:
        """Nodes that fill the link of the store."""
        return self.store_bps / self.node_bps


@dataclass(slots=True)
class Node:
    """A node that works on a batch: files fetch one after the other, and are made one after the other."""

    to_fetch: int = 0
    fetching_bytes: float = 0.0  # still to come of the file on its way
    waiting: int = 0  # fetched, not made
    making_s: float = 0.0
    pause_s: float = 0.0

    @property
    def is_idle(self) -> bool:
        """True between batches."""
        return not (self.to_fetch or self.fetching_bytes > 0 or self.waiting or self.making_s > 0 or self.pause_s > 0)

    def step(self, model: Model, rate_bps: float, step_s: float) -> int:
        """Let time pass; files that were finished."""
        if self.pause_s > 0:
            self.pause_s -= step_s
            return 0
        if self.fetching_bytes > 0:
            self.fetching_bytes -= rate_bps * step_s
            self.waiting += self.fetching_bytes <= 0
        if self.fetching_bytes <= 0 and self.to_fetch and self.waiting < model.ahead:
            self.to_fetch -= 1
            self.fetching_bytes += model.file_bytes
        done = 0
        if self.making_s > 0:
            self.making_s -= step_s
            done = int(self.making_s <= 0)
        if self.making_s <= 0 and self.waiting:
            self.waiting -= 1
            self.making_s += model.make_s
        return done


def simulate(model: Model, count: int) -> float:
    """Seconds of a job with `count` nodes."""
    nodes = [Node() for _ in range(count)]
    unclaimed, left, now_s = model.files, model.files, 0.0
    while left:
        for node in nodes:
            if node.is_idle and unclaimed:
                batch = min(unclaimed, batch_files(unclaimed, count))
                unclaimed -= batch
                node.to_fetch, node.pause_s = batch, model.batch_s
        active = sum(n.fetching_bytes > 0 for n in nodes)
        rate_bps = min(model.node_bps, model.store_bps / max(1, active))
        left -= sum(node.step(model, rate_bps, STEP_S) for node in nodes)
        now_s += STEP_S
    return now_s + model.end_s


# --- output ----------------------------------------------------------------------------------------------------------


def show(rows: Sequence[dict[str, Any]]) -> None:
    """A table of them."""
    print("| workers | seconds | times one | of what is possible |\n| --- | --- | --- | --- |")
    for r in rows:
        print(f"| {r['workers']} | {r['seconds']:.1f} | {r['times']:.2f} | {r['share']:.2f} |")


def main() -> None:
    """See the module."""
    if sys.argv[1:2] == ["--work"]:
        job, source, gate = map(Path, sys.argv[2:5])
        be_worker(job, source, gate, sys.argv[5])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", default="1,2,4,8", help="counts, the first is what others are compared with")
    parser.add_argument("--files", type=int, default=48)
    parser.add_argument("--file-s", type=float, default=1.5, help="seconds of a file for one worker")
    parser.add_argument("--link", type=float, default=4, help="the store's link, in units of a node's")
    parser.add_argument("--paper", action="store_true", help="1,000 files of 5 GB, on paper")
    parser.add_argument("--json", type=Path, help="write every single figure to this file")
    args = parser.parse_args()
    if args.paper:
        model = Model()
        counts = (1, 2, 4, 8, 16, 32, 64)
        seconds = {n: simulate(model, n) for n in counts}
        rows = [_row(n, seconds[n], seconds[1], model.full) for n in counts]
    else:
        counts = tuple(int(n) for n in args.workers.split(","))
        with tempfile.TemporaryDirectory() as folder:
            rows = measure(counts, args.files, args.link, args.file_s, Path(folder))
    show(rows)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
