"""Limits: how fast and where a run works. Nothing here changes an output byte."""

import os
from dataclasses import dataclass, field

from shardq.errors import BadOption, BudgetTooSmall
from shardq.logs import LogConfig

BASE_BYTES = 64 << 20  # the supervisor and the fork server, measured: 48 MB
TENSOR_BYTES = 4 << 10  # the supervisor's records of one tensor, measured: 2.9 kB
WORKER_BYTES = 10 << 20  # one worker before its first task, measured: 5 MB


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True, slots=True)
class Limits:
    """What a run may use."""

    parallel: int = field(default_factory=_cores)  # worker processes; 1 works in the calling process
    max_ram_bytes: int | None = None  # of the whole process tree
    max_disk_bytes: int | None = None  # of output and staged source shards together
    delete_source: bool = False  # delete a local source shard as soon as its output is durable
    log: LogConfig | None = None  # where workers log; None: nowhere of their own

    def __post_init__(self) -> None:
        """Raises BadOption."""
        if self.parallel < 1:
            raise BadOption(f"--parallel {self.parallel}: expected at least 1 worker")

    def task_bytes(self, largest_task_bytes: int, tensors: int) -> int | None:
        """Memory that running tasks may take together; None without a cap. Raises BudgetTooSmall."""
        if self.max_ram_bytes is None:
            return None
        fixed = BASE_BYTES + tensors * TENSOR_BYTES + self.parallel * WORKER_BYTES
        left = self.max_ram_bytes - fixed
        if left < largest_task_bytes:
            need = largest_task_bytes + fixed
            raise BudgetTooSmall(
                f"--max-ram {self.max_ram_bytes / 1e6:.0f} MB is too small for {self.parallel} workers: the largest "
                f"task needs {largest_task_bytes / 1e6:.0f} MB; expected at least {need / 1e6:.0f} MB, or fewer "
                "workers with --parallel"
            )
        return left
