"""Refuses a run that the disk cannot hold, before it starts."""

import errno
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from shardq.admission import ShardCost, least_disk_bytes
from shardq.errors import DiskFull
from shardq.onepass import OnePass
from shardq.staging import Staging


def check_space(
    work: OnePass, stagings: Sequence[Staging], todo: Sequence[ShardCost], uploads: bool, delete_source: bool
) -> None:
    """Raises DiskFull when the file system of an output folder has less free than the shards in `todo` need. The
    outputs of a run are taken to be on one file system."""
    staged = {c.name: allocated_bytes(stagings[0].src / c.name) for c in todo}
    left: list[ShardCost] = []
    for c in todo:
        files = tuple(
            replace(f, size_bytes=f.size_bytes - allocated_bytes(stagings[f.lane].part / f.name)) for f in c.files
        )
        output_bytes = sum(f.size_bytes for f in files)
        left.append(replace(c, staged_bytes=c.staged_bytes - staged[c.name], output_bytes=output_bytes, files=files))
    need = _growth_bytes(work, left) if delete_source else least_disk_bytes(left, 0, uploads)
    free = shutil.disk_usage(stagings[0].work).free
    if need > free:
        raise DiskFull(
            f"{stagings[0].out} needs {need / 1e9:.2f} GB more and its disk has {free / 1e9:.2f} GB free: free "
            "some space or choose another --output-dir"
        )


def _growth_bytes(work: OnePass, left: Sequence[ShardCost]) -> int:
    """The most by which a run that deletes its source will ever have grown the disk's content: files are made in order,
    and each makes room for others once it is done."""
    sizes = {s.name: s.size_bytes for s in work.checkpoint.shards}
    now = peak = 0
    goes: dict[int, int] = {}  # place -> what is deleted before it
    for number, cost in enumerate(left):
        now += cost.total_bytes - goes.pop(number, 0)
        peak = max(peak, now)
        goes[number + cost.hold + 1] = goes.get(number + cost.hold + 1, 0) + sizes[cost.name]
    return peak + max((c.output_bytes for c in left[1:]), default=0)  # the next is begun before the last one is done


def allocated_bytes(path: Path) -> int:
    """Bytes of disk that a file holds, 0 for none."""
    try:
        return path.stat().st_blocks * 512
    except OSError as e:
        if e.errno == errno.ENOENT:
            return 0
        raise
