"""Refuses a run that the disk cannot hold, before it starts."""

import errno
import shutil
from collections.abc import Sequence
from pathlib import Path

from shardq.admission import ShardCost, least_disk_bytes
from shardq.errors import DiskFull
from shardq.plans import Plan
from shardq.staging import Staging


def check_space(plan: Plan, staging: Staging, todo: Sequence[ShardCost], uploads: bool, delete_source: bool) -> None:
    """Raises DiskFull when the file system of the output folder has less free than the shards in `todo` need."""
    staged = {c.name: allocated_bytes(staging.src / c.name) for c in todo}
    parts = {c.name: allocated_bytes(staging.part / c.name) for c in todo}
    left = [ShardCost(c.name, c.staged_bytes - staged[c.name], c.output_bytes - parts[c.name]) for c in todo]
    need = _growth_bytes(plan, left) if delete_source else least_disk_bytes(left, 0, uploads)
    free = shutil.disk_usage(staging.work).free
    if need > free:
        raise DiskFull(
            f"{staging.out} needs {need / 1e9:.2f} GB more and its disk has {free / 1e9:.2f} GB free: free "
            "some space or choose another --output-dir"
        )


def _growth_bytes(plan: Plan, left: Sequence[ShardCost]) -> int:
    """The most by which a run that deletes its source will ever have grown the disk's content: files are made in order,
    and each makes room for others once it is done."""
    sizes = {s.name: s.size_bytes for s in plan.checkpoint.shards}
    now = peak = 0
    for cost in left:
        now += cost.total_bytes
        peak = max(peak, now)
        now -= sizes[cost.name]
    return peak + max((c.output_bytes for c in left), default=0)  # the next file is begun before the last one is done


def allocated_bytes(path: Path) -> int:
    """Bytes of disk that a file holds, 0 for none."""
    try:
        return path.stat().st_blocks * 512
    except OSError as e:
        if e.errno == errno.ENOENT:
            return 0
        raise
