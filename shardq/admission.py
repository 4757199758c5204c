"""Which shard a run may begin next, so that the disk it takes stays under a cap."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from shardq.budget import ByteBudget
from shardq.errors import BudgetTooSmall

AHEAD: Final = 3  # shards staged or on their way at a time; with uploads, as many output files again


@dataclass(frozen=True, slots=True)
class FileCost:
    """Disk that one output file needs."""

    lane: int  # number of the output
    name: str
    size_bytes: int
    hold: int  # so many shards after the one that it begins with have to be done before it is made


@dataclass(frozen=True, slots=True)
class ShardCost:
    """Disk that one shard needs."""

    name: str
    staged_bytes: int  # for the source shard, until its output is durable; 0 when it needs no copy
    output_bytes: int  # for the output files that begin with it
    hold: int = 0  # so many shards after it have to be done before it can go: they share a stack or a scale
    lent_bytes: int = 0  # what it would take instead in range mode, for what it borrows of others
    files: tuple[FileCost, ...] = ()  # these files; none are given where all are made when the shard may go

    @property
    def total_bytes(self) -> int:
        """While both are there."""
        return self.staged_bytes + self.output_bytes

    @property
    def outputs(self) -> tuple[tuple[int, int], ...]:
        """Size and hold of the output files."""
        return tuple((f.size_bytes, f.hold) for f in self.files) or ((self.output_bytes, self.hold),)


class Admission:
    """Shards in the order of the plan; the next one is begun when the cap has room for it and few are under way.

    `begin`, then `free` when the source shard is gone and, where outputs are uploaded, `release` when the output file
    is gone. Without uploads outputs are never released, so a cap has to hold all of them.
    """

    def __init__(
        self,
        todo: Sequence[ShardCost],
        kept_bytes: int,
        waiting: Mapping[str, int],
        cap_bytes: int | None,
        uploads: bool,
        hurried: bool,
    ) -> None:
        """`kept_bytes` are on the disk already, or will be besides the shards; `waiting`: outputs of an earlier run, by
        source shard, that will be uploaded. `hurried`: nothing is staged or uploaded, so nothing is gained by waiting.
        Raises BudgetTooSmall when the cap can never hold."""
        self._todo = list(reversed(todo))
        self._begun: list[str] = []
        self._uploads, self._hurried = uploads, hurried
        self._ahead = max([AHEAD, *(c.hold + 1 for c in todo)])  # fewer could not get on
        self._open_outputs = 2 * max([self._ahead, *(hold + 1 for c in todo for _, hold in c.outputs)])
        self._staged: dict[str, int] = {}
        self._outputs = dict(waiting)  # on the disk and to be uploaded
        self._budget = ByteBudget(cap_bytes)
        least = max(least_disk_bytes(todo, kept_bytes, uploads), kept_bytes + sum(waiting.values()))
        if cap_bytes is not None and cap_bytes < least:
            raise BudgetTooSmall(_too_small(todo, kept_bytes, cap_bytes, least, uploads))
        self._budget.take(kept_bytes + sum(waiting.values()))

    @property
    def staged(self) -> tuple[str, ...]:
        """Shards that are in the staging folder or on their way there."""
        return tuple(self._staged)

    @property
    def begun(self) -> tuple[str, ...]:
        """Shards that `next` has given so far."""
        return tuple(self._begun)

    @property
    def used_bytes(self) -> int:
        """Disk that is promised now."""
        return self._budget.used_bytes

    def next(self) -> ShardCost | None:
        """The next shard, begun; None when it has to wait, or none is left."""
        if not self._todo:
            return None
        cost = self._todo[-1]
        busy = not self._hurried and (len(self._staged) >= self._ahead or len(self._outputs) >= self._open_outputs)
        if busy or not self._budget.admits(cost.total_bytes):
            return None
        self._budget.take(cost.total_bytes)
        self._begun.append(cost.name)
        if cost.staged_bytes:
            self._staged[cost.name] = cost.staged_bytes
        if self._uploads and cost.output_bytes:
            self._outputs[cost.name] = self._outputs.get(cost.name, 0) + cost.output_bytes
        return self._todo.pop()

    def free(self, name: str) -> None:
        """The staged source shard is deleted."""
        self._budget.give(self._staged.pop(name, 0))

    def release(self, name: str, size_bytes: int) -> None:
        """A file that began with a source shard is uploaded and deleted."""
        self._budget.give(size_bytes)
        self._outputs[name] -= size_bytes
        if self._outputs[name] == 0:
            del self._outputs[name]


def least_disk_bytes(todo: Sequence[ShardCost], kept_bytes: int, uploads: bool) -> int:
    """The smallest cap under which a run gets through."""
    if uploads:
        return kept_bytes + _widest(todo, outputs=True)
    return kept_bytes + sum(c.output_bytes for c in todo) + _widest(todo, outputs=False)


def _widest(todo: Sequence[ShardCost], outputs: bool) -> int:
    """The largest sum of sizes of shards, and of `outputs`, that must be there at the same time."""
    ends: dict[int, int] = {}  # place behind the last shard that one waits for -> what goes then
    now = peak = 0
    for number, cost in enumerate(todo):
        now -= ends.pop(number, 0)
        for size, hold in ((cost.staged_bytes, cost.hold), *(cost.outputs if outputs else ())):
            now += size
            ends[number + hold + 1] = ends.get(number + hold + 1, 0) + size
        peak = max(peak, now)
    return peak


def _too_small(todo: Sequence[ShardCost], kept_bytes: int, cap: int, least: int, uploads: bool) -> str:
    largest = _widest(todo, outputs=False)
    if uploads:
        why = "the largest shard, its output, what waits for its upload and the records"
    else:
        outputs = kept_bytes + sum(c.output_bytes for c in todo)
        why = f"the output with {megabytes(outputs)} and the largest shard to fetch with {megabytes(largest)}"
    bare = [replace(c, staged_bytes=c.lent_bytes) for c in todo]
    ways = [("--stream", least_disk_bytes(bare, kept_bytes, uploads))]
    if not uploads:
        ways.append(("--push-to", least_disk_bytes(todo, kept_bytes, True)))
        if largest:
            ways.append(("both", least_disk_bytes(bare, kept_bytes, True)))
    instead = "".join(f", or {megabytes(need)} with {way}" for way, need in ways if need < least)
    return f"--max-disk {megabytes(cap)} is too small for {why}; expected at least {megabytes(least)}{instead}"


def megabytes(size_bytes: int) -> str:
    """For messages, rounded up, so that what is asked for is enough."""
    return f"{-(-size_bytes // 10_000) / 100:.2f} MB"
