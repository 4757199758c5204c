"""Where a worker finds source bytes: in files, or in a piece of memory that range mode has brought, and beside it what
was lent."""

import os
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from shardq.descriptors import Descriptors
from shardq.files.atomic import pread_exact
from shardq.files.direct import ROOM_BYTES, DirectDisk, aligned_bytes
from shardq.slabs import Mappings, Slab, open_slab
from shardq.tasks import TILE_BYTES, RowsTask, Streamed, SurveyTask, Workplace

if TYPE_CHECKING:
    from shardq.dequantize.base import Part
    from shardq.dequantize.decoding import Ranges


class SourceBytes:
    """Of one piece of work after the other."""

    def __init__(self, place: Workplace, disk: DirectDisk) -> None:
        self._place = place
        self._fetched = os.path.join(place.fetched, "") if place.fetched else None  # what all paths below it begin with
        self._disk = disk
        self._files = Descriptors(os.O_RDONLY)
        self._lent = Descriptors(os.O_RDONLY)
        self._mappings = Mappings()
        self._aligned: NDArray[np.uint8] | None = None  # for tiles that come from the disk
        self._rooms: dict[str, NDArray[np.uint8]] = {}  # by role of a part, for tiles: fresh pages cost page faults
        self.memory: Streamed | None = None  # where those of the present work are, if not in files

    def leave(self) -> None:
        """The present work is done: what is deleted then must not take disk for as long as it is open."""
        self._lent.close()

    def release(self) -> None:
        """Give memory back."""
        self._rooms.clear()
        self._aligned = None

    def open(
        self, shard: str, begin: int, size_bytes: int, room: NDArray[np.uint8], alignment: int, tensor: str
    ) -> AbstractContextManager[Slab]:
        """Consecutive bytes of what is not encoded, or of codes; `room` and `alignment` as of open_slab."""
        what = f"{tensor} in {shard}"
        if memory := self.memory:
            pages = self._mappings.get(memory.path)
            return open_slab(pages, begin - memory.origin, size_bytes, room, alignment, what)
        path = self._place.sources[shard]
        is_fetched = self._fetched is not None and path.startswith(self._fetched)  # past the cache, so it is not there
        direct = (self._disk, self._disk_room()) if is_fetched else None
        return open_slab(self._files.get(path), begin, size_bytes, room, alignment, what, direct)

    def read_part(self, task: RowsTask | SurveyTask, part: "Part", ranges: "Ranges") -> NDArray[np.uint8]:
        """The bytes of some ranges of a part, one behind the other; valid until the next ones of a part of this role.
        Raises CorruptShard, SourceUnreadable."""
        data = self._room(part.role, sum(end - begin for begin, end in ranges))
        at = 0
        for begin, end in ranges:
            piece = data[at : at + end - begin]
            what = f"{part.tensor} for {task.tensor}"
            if self._is_lent(part, begin, end):
                fd = self._lent.get(os.path.join(self._place.lent, task.shard, part.shard))
                pread_exact(fd, piece.data, begin, f"{what} in {part.shard}")
            else:
                with self.open(part.shard, begin, end - begin, piece, 1, what) as slab:
                    found = slab.tile(0, end - begin)
                if found is not piece:
                    piece[:] = found
            at += end - begin
        return data

    def _disk_room(self) -> NDArray[np.uint8]:
        if self._aligned is None:
            self._aligned = aligned_bytes(ROOM_BYTES)
        return self._aligned

    def _room(self, role: str, size_bytes: int) -> NDArray[np.uint8]:
        """Memory that is used again, but for what is more than a tile."""
        room = self._rooms.get(role)
        if room is None or room.size < size_bytes:
            room = np.empty(size_bytes, np.uint8)
            if size_bytes <= TILE_BYTES:
                self._rooms[role] = room
        return room[:size_bytes]

    def _is_lent(self, part: "Part", begin: int, end: int) -> bool:
        """True if these bytes did not come in one piece with the codes."""
        if (memory := self.memory) is None or part.role == "codes":
            return False
        first, behind = memory.extent
        return part.shard != memory.work.shard or begin < first or end > behind
