"""Source shards that go one by one, though files are made of many: which are settled, and which files that concerns.

A shard is settled when all that becomes of it is in the parts of its files, durable and recorded. It may go then, long
before these files are sealed.
"""

from collections.abc import Collection
from dataclasses import dataclass

from shardq.plans import Plan


@dataclass(frozen=True, slots=True)
class Route:
    """Where tasks read and write: those of a shard that have it in common."""

    shard: str  # of the tasks
    reads: frozenset[str]  # source shards
    files: frozenset[str]


class Settling:
    """Of one output. A file is not sealed while it is being made durable for a shard, and the reverse, as sealing
    moves it."""

    def __init__(self, plan: Plan, settled: Collection[str]) -> None:
        """`settled`: in an earlier run."""
        self._settled = set(settled)
        self._under_way: dict[str, frozenset[str]] = {}  # shard -> files
        self._by_shard: dict[str, list[Route]] = {}
        self._by_read: dict[str, list[Route]] = {}
        self._by_file: dict[str, list[Route]] = {}
        for route in sorted(_routes(plan), key=lambda r: (r.shard, sorted(r.files))):
            self._by_shard.setdefault(route.shard, []).append(route)
            for shard in route.reads:
                self._by_read.setdefault(shard, []).append(route)
            for file in route.files:
                self._by_file.setdefault(file, []).append(route)

    def has(self, shard: str) -> bool:
        """True if a shard is settled."""
        return shard in self._settled

    def files(self, shard: str) -> frozenset[str]:
        """What a shard's tasks write into."""
        return frozenset[str]().union(*(r.files for r in self._by_shard.get(shard, ())))

    def reads(self, shard: str) -> frozenset[str]:
        """All shards that a shard's tasks read."""
        return frozenset[str]().union(*(r.reads for r in self._by_shard.get(shard, ())))

    def needs(self, shard: str, sealed: Collection[str]) -> bool:
        """True while something is to be made of a shard, or is not durable."""
        return any(not self._is_kept(r, sealed) for r in self._by_read.get(shard, ()))

    def doubtful(self, file: str) -> frozenset[str]:
        """Shards that were read for a file, but for what is settled."""
        return frozenset[str]().union(*(r.reads for r in self._by_file.get(file, ()) if not self.has(r.shard)))

    def held(self, sealed: Collection[str]) -> frozenset[str]:
        """Files that are not sealed and have in them what was made of settled shards."""
        found = (r.files for shard in self._settled for r in self._by_shard.get(shard, ()))
        return frozenset[str]().union(*found) - frozenset(sealed)

    def begin(self, shard: str, files: frozenset[str]) -> None:
        """What was made of a shard is about to be made durable in `files`."""
        self._under_way[shard] = files

    def is_begun(self, shard: str) -> bool:
        """True from then on."""
        return shard in self._under_way or shard in self._settled

    def end(self, shard: str) -> frozenset[str]:
        """A shard is settled. Returns the files."""
        self._settled.add(shard)
        return self._under_way.pop(shard)

    def is_busy(self, file: str) -> bool:
        """True while a file is being made durable for some shard."""
        return any(file in files for files in self._under_way.values())

    def _is_kept(self, route: Route, sealed: Collection[str]) -> bool:
        return self.has(route.shard) or all(f in sealed for f in route.files)


def _routes(plan: Plan) -> set[Route]:
    """Of all tasks of which something becomes."""
    return {Route(t.shard, t.shards, frozenset(t.files)) for t in plan.tasks if t.files}
