"""Limits: how fast and where a run works. Nothing here changes an output byte."""

import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from shardq.errors import BadOption, BudgetTooSmall
from shardq.logs import LogConfig

if TYPE_CHECKING:
    from shardq.onepass import OnePass

SpoolAs = Literal["auto", "plain", "zstd"]  # hidden states in files; auto: zstd where plain ones find no room

BASE_BYTES = 64 << 20  # the supervisor, and the fork server where there is one, measured: 48 MB
TENSOR_BYTES = 4 << 10  # the supervisor's records of one tensor, measured: 2.9 kB
WORKER_BYTES = 10 << 20  # one worker before its first task, measured: 5 MB
HUB_BYTES = 48 << 20  # the HTTP client and the Hub's library, measured: 40 MB
XET_BUFFER_BYTES = 256 << 20  # that the Xet client may hold; it takes gigabytes if nobody tells it
LEAST_RATE_BYTES_S = 10_000  # ten times what the fetcher gives a connection up for
LEAST_SLOTS = 2  # pieces of range mode: one is filled while the other is worked on
SPANS_AHEAD = 2  # pieces that range mode holds besides those that workers read


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True, slots=True)
class Limits:
    """What a run may use."""

    parallel: int = field(default_factory=_cores)  # worker processes; 1 works in the calling process
    max_ram_bytes: int | None = None  # of the whole process tree
    max_disk_bytes: int | None = None  # of output and staged source shards together
    delete_source: bool = False  # delete a local source shard as soon as its output is durable
    stream: bool = False  # range mode: keep no source shard on the disk
    keep_local: bool = False  # keep output files also when they are uploaded
    max_rate_bytes_s: int | None = None  # of all downloads together, and of all uploads
    xet: bool = False  # fetch files that the Hub keeps in Xet storage with the library's Xet client
    log: LogConfig | None = None  # where workers log; None: nowhere of their own

    def __post_init__(self) -> None:
        """Raises BadOption."""
        if self.parallel < 1:
            raise BadOption(f"--parallel {self.parallel}: expected at least 1 worker")
        if self.xet and self.stream:
            raise BadOption("--xet fetches whole files, --stream reads ranges: give one of them")
        if self.xet and self.max_rate_bytes_s is not None:
            raise BadOption("--max-rate cannot slow the Xet client down: leave --xet out")
        if self.max_rate_bytes_s is not None and self.max_rate_bytes_s < LEAST_RATE_BYTES_S:
            raise BadOption(
                f"--max-rate {self.max_rate_bytes_s} bytes/s would look like a dead link: expected at least "
                f"{LEAST_RATE_BYTES_S // 1000}k"
            )

    def _network_bytes(self, network: bool) -> int:
        return (HUB_BYTES + (XET_BUFFER_BYTES if self.xet else 0)) if network else 0

    def _slots(self, remote: bool) -> int:
        return self.parallel + SPANS_AHEAD if self.stream and remote else 0

    def least_ram_bytes(self, work: "OnePass", remote: bool, network: bool) -> int:
        """The smallest --max-ram for so many workers; `remote` and `network` as for share_memory."""
        from shardq.spans import largest_span_bytes
        from shardq.traffic import extra_memory_bytes

        slots = min(self._slots(remote), LEAST_SLOTS)
        fixed = BASE_BYTES + work.records * TENSOR_BYTES + self.parallel * WORKER_BYTES + self._network_bytes(network)
        fixed += extra_memory_bytes(work) if slots else 0
        return fixed + work.largest_task_bytes + (slots * largest_span_bytes(work) if slots else 0)

    def share_memory(self, work: "OnePass", remote: bool, network: bool) -> "Memory":
        """What running tasks may take together, and how many pieces range mode may hold.

        `remote`: the source is on the Hub; `network`: the source or the destination is. Raises BudgetTooSmall.
        """
        wanted = self._slots(remote)
        if self.max_ram_bytes is None:
            return Memory(None, wanted)
        from shardq.spans import largest_span_bytes

        largest_task_bytes, span_bytes = work.largest_task_bytes, largest_span_bytes(work)
        need = self.least_ram_bytes(work, remote, network)
        left = self.max_ram_bytes - need + min(wanted, LEAST_SLOTS) * span_bytes
        if self.max_ram_bytes < need:
            pieces = f" and range mode two pieces of {span_bytes / 1e6:.0f} MB" if wanted else ""
            raise BudgetTooSmall(
                f"--max-ram {self.max_ram_bytes / 1e6:.0f} MB is too small for {self.parallel} workers: the largest "
                f"task needs {largest_task_bytes / 1e6:.0f} MB{pieces}; expected at least {need / 1e6:.0f} MB, or "
                "fewer workers with --parallel"
            )
        slots = min(wanted, left // span_bytes) if wanted else 0
        return Memory(left + largest_task_bytes - slots * span_bytes, slots)


@dataclass(frozen=True, slots=True)
class Memory:
    """How a run divides its memory."""

    task_bytes: int | None  # for all running tasks together; None: no cap
    slots: int  # pieces of range mode; 0 without it
