"""The part of a batch's budget that one model may use. Models are made one after the other, each with all of it but for
what the batch itself takes, and what unfinished outputs of other models hold on the disk."""

import os
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from shardq.batch.manifest import Entry, Manifest
from shardq.limits import Limits
from shardq.staging import WORK

BATCH_BYTES: Final = 80 << 20  # memory of the batch's own process, measured: 62 MB
_BLOCK_BYTES: Final = 512  # what st_blocks counts


@dataclass(frozen=True, slots=True)
class Room:
    """What a model may use."""

    limits: Limits
    held_bytes: int  # of the disk, by others


def find_room(manifest: Manifest, entries: Collection[Entry]) -> Room:
    """For these entries, which are of one model."""
    mine = {e.out for e in entries}
    limits, held = manifest.limits, 0
    if limits.max_disk_bytes is not None:
        held = sum(_disk_bytes(e.out / WORK) for m in manifest.models for e in m.entries if e.out not in mine)
        limits = replace(limits, max_disk_bytes=max(1, limits.max_disk_bytes - held))
    if limits.max_ram_bytes is not None:
        limits = replace(limits, max_ram_bytes=max(1, limits.max_ram_bytes - BATCH_BYTES))
    return Room(replace(limits, keep_local=any(e.keep_local for e in entries)), held)


def _disk_bytes(folder: Path) -> int:
    """What the files below a folder take."""
    total = 0
    for top, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):  # a process that ends just now is clearing up
                total += os.lstat(os.path.join(top, name)).st_blocks * _BLOCK_BYTES
    return total
