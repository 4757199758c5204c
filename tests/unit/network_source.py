"""A source beyond a network, for tests that count what is asked for."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from shardq.sources.base import SourceFile


@dataclass
class NetworkSource:
    """A remote source in memory that counts its reads."""

    contents: Mapping[str, bytes]
    reads: list[tuple[str, int, int]]
    label: str = "org/name"
    commit: str | None = "0" * 40
    remote: bool = True

    def files(self) -> tuple[SourceFile, ...]:
        return tuple(SourceFile(n, len(d), None) for n, d in self.contents.items())

    def read(self, name: str, begin: int, end: int) -> bytes:
        self.reads.append((name, begin, end))
        assert end <= len(self.contents[name])
        return self.contents[name][begin:end]

    def local_path(self, name: str) -> Path | None:
        return None

    def fetch(self, name: str, target: Path, on_bytes: Callable[[int], None]) -> str | None:
        raise AssertionError("headers need no whole shard")
