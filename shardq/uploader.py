"""Uploads finished files while others are still being made, one at a time, in order."""

from dataclasses import dataclass
from pathlib import Path

from shardq.background import Background
from shardq.destinations.base import Storage, StoredFile
from shardq.errors import ShardqError


@dataclass(frozen=True, slots=True)
class Uploaded:
    """A file whose content is stored, or the reason why it is not."""

    file: StoredFile
    error: ShardqError | None


class Uploader(Background[tuple[Path, StoredFile], Uploaded]):
    """Sends files on a background thread."""

    def __init__(self, storage: Storage) -> None:
        """Begin, with nothing to do."""
        self._storage = storage
        self._submitted_bytes = self._done_bytes = 0
        super().__init__(
            self._upload, lambda job, error: Uploaded(job[1], error), lambda job: f"uploading {job[1].name}"
        )

    @property
    def waiting_bytes(self) -> int:
        """Of the files that were submitted and are not done: what must stay on the disk."""
        return self._submitted_bytes - self._done_bytes

    def submit(self, path: Path, file: StoredFile) -> None:
        """Send the content of `path` after all that was submitted before."""
        self._submitted_bytes += file.size_bytes
        self.start((path, file))

    def take(self) -> list[Uploaded]:
        """What is done since the last call, in order."""
        done = super().take()
        self._done_bytes += sum(d.file.size_bytes for d in done)
        return done

    def _upload(self, job: tuple[Path, StoredFile]) -> Uploaded:
        path, file = job
        self._storage.upload(path, file, self.count)
        return Uploaded(file, None)
