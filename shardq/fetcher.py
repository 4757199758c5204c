"""Fetches remote shards into the staging folder on background threads. How many at a time is the caller's decision."""

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from shardq.background import Background
from shardq.checkpoint import Shard
from shardq.errors import ShardqError
from shardq.files.atomic import writing
from shardq.sources.base import Source

THREADS: Final = 2


@dataclass(frozen=True, slots=True)
class Fetched:
    """A shard that has arrived, or the reason why it has not."""

    shard: Shard
    sha256: str | None
    error: ShardqError | None


class Fetcher(Background[Shard, Fetched]):
    """Downloads shards, begun in order."""

    def __init__(self, source: Source, folder: Path) -> None:
        """Begin, with nothing to do."""
        self._source, self._folder = source, folder
        super().__init__(
            self._fetch, lambda shard, error: Fetched(shard, None, error), lambda s: f"fetching {s.name}", THREADS
        )

    def _fetch(self, shard: Shard) -> Fetched:
        target = self._folder / shard.name
        with writing(target):
            target.parent.mkdir(parents=True, exist_ok=True)
        return Fetched(shard, self._source.fetch(shard.name, target, self.count), None)
