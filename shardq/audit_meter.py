"""A source whose reads are counted."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock

from shardq.sources.base import FileReader, Source, SourceFile


@dataclass(slots=True)
class Meter:
    """Hands everything on. All reads are ranges: nothing is fetched, no path is handed out; threads may share it."""

    inner: Source
    remote: bool = True
    read_bytes: int = 0
    requests: int = 0
    _lock: Lock = field(default_factory=Lock)

    @property
    def label(self) -> str:
        """As the source's."""
        return self.inner.label

    @property
    def commit(self) -> str | None:
        """As the source's."""
        return self.inner.commit

    def files(self) -> tuple[SourceFile, ...]:
        """As the source's."""
        return self.inner.files()

    def read(self, name: str, begin: int, end: int) -> bytes:
        """Count, and read."""
        with self._lock:
            self.read_bytes += end - begin
            self.requests += 1
        return self.inner.read(name, begin, end)

    def local_path(self, name: str) -> Path | None:
        """None, so that headers are read by ranges too."""
        del name
        return None

    def fetch(self, name: str, target: Path, on_bytes: Callable[[int], None]) -> str | None:
        """Not for what is read by ranges."""
        del on_bytes
        raise AssertionError(f"{name} is read by ranges and not fetched to {target}")

    def open_file(self, name: str, on_bytes: Callable[[int], None]) -> FileReader:
        """Not for what is read by `read`, which counts."""
        del on_bytes
        raise AssertionError(f"{name} is read without a reader")
