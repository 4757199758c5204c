"""stub"""

from dataclasses import dataclass
from pathlib import Path

from shardq.destinations.base import Destination, StoredFile
from shardq.errors import ShardqError


@dataclass(frozen=True, slots=True)
class Uploaded:
    file: StoredFile
    error: ShardqError | None


class Uploader:
    ready: int
    uploaded_bytes: int

    def __init__(self, destination: Destination) -> None: ...
    def submit(self, path: Path, file: StoredFile) -> None: ...
    def take(self) -> list[Uploaded]: ...
    def close(self) -> None: ...
