"""Finished output files that wait to be sealed, so that several are hashed side by side."""

from typing import Final

from shardq.tasks import SealTask, Unsealed

TOGETHER: Final = 3  # as kernels.sha256 has it, which loads numpy
TOGETHER_STAGED: Final = 2  # where source shards wait with them for their deletion, and keep others from coming


class Seals:
    """They wait only while there is other work: what is made last is sealed as it is."""

    def __init__(self, staged: bool) -> None:
        """`staged`: few source shards may be on the disk at a time, or few output files."""
        self._together = TOGETHER_STAGED if staged else TOGETHER
        self._waiting: list[Unsealed] = []

    def add(self, file: Unsealed) -> None:
        """A file is finished."""
        self._waiting.append(file)

    def take(self, is_idle: bool) -> SealTask | None:
        """What is to be sealed now; `is_idle`: nothing else is left to do at the moment."""
        if not self._waiting or (len(self._waiting) < self._together and not is_idle):
            return None
        task = SealTask(tuple(self._waiting[: self._together]))
        del self._waiting[: self._together]
        return task
