"""Work of one pass that workers may begin, in order; and what waits until all that it reads is there, and the largest
magnitudes that it needs are known."""

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from shardq.jobs import Work
from shardq.onepass import OnePass
from shardq.supply import Supply
from shardq.survey import Survey
from shardq.tasks import Bundle, Streamed, Surveyed

if TYPE_CHECKING:
    from shardq.streamer import Piece


class Backlog:
    """Grows with what the supply brings and what workers measure; knows nothing of outputs."""

    def __init__(self, work: OnePass, bundles: Mapping[str, Sequence[Bundle]], survey: Survey, supply: Supply) -> None:
        """`bundles`: what is left to do of each shard."""
        self._work, self._bundles, self._survey, self._supply = work, bundles, survey, supply
        self._todo: deque[Work] = deque()
        self._waiting: list[str] = []  # shards at hand whose bundles read others that are not
        self._reads = {  # shard -> all shards that its bundles read
            name: frozenset({name}).union(*(b.shards for b in own)) for name, own in bundles.items()
        }
        self._wanted: dict[str, set[str]] = {}  # shard -> its tensors whose magnitudes are needed
        for name in survey.needed(b for own in bundles.values() for b in own):
            self._wanted.setdefault(work.tensors[name].shard, set()).add(name)

    @property
    def is_empty(self) -> bool:
        """True if nothing may begin now."""
        return not self._todo

    def put_first(self, work: Work) -> None:
        """What comes before all else."""
        self._todo.appendleft(work)

    def pop(self) -> Work:
        """The next; only when there is one."""
        return self._todo.popleft()

    def take_shard(self, shard: str) -> list[str]:
        """A shard is at hand. Queues the bundles of all shards whose companions are now, too, and returns these shards;
        what an earlier run did is only checked."""
        self._waiting.append(shard)
        complete = [name for name in self._waiting if all(map(self._supply.is_at_hand, self._reads[name]))]
        self._waiting = [name for name in self._waiting if name not in complete]
        for name in complete:
            bundles = self._bundles[name]
            named = self._survey.needed(bundles) | self._wanted.get(name, set())
            at_hand = {n for n in named if all(map(self._supply.is_at_hand, self._work.shards_of(n)))}
            self._todo.extend(self._survey.tasks(at_hand))
            self._queue(bundles)
        return complete

    def take_piece(self, piece: "Piece") -> None:
        """Queue the bundles of a piece in memory; what they need from elsewhere is read ahead."""
        span, bundles = piece.span, piece.span.bundles
        extent = (span.begin, span.end)
        self._todo.extend(
            Streamed(task, piece.slot.path, piece.origin, extent)
            for task in self._survey.tasks({b.tensor for b in bundles if b.tensor in self._work.reaches}, extent)
        )
        for name in sorted(self._survey.needed(bundles)):
            if not self._survey.expects(name):
                self._read_ahead(name)
        self._queue([Streamed(b, piece.slot.path, piece.origin, extent) for b in bundles])

    def take_surveyed(self, surveyed: Surveyed) -> float | None:
        """A slab was measured; what waited for it comes first. Returns the tensor's magnitude when it is complete."""
        amax = self._survey.take(surveyed)
        self._todo.extendleft(reversed(self._survey.ready()))
        return amax

    def take_ahead(self, tensor: str, amax: float) -> None:
        """A tensor was read ahead."""
        self._survey.take_ahead(tensor, amax)
        self._todo.extend(self._survey.ready())

    def forget(self, shard: str) -> None:
        """A shard came wrong, and with it what was measured there."""
        for name in self._survey.forget(shard):
            self._read_ahead(name)

    def _queue(self, work: Iterable[Bundle | Streamed]) -> None:
        """Those that need a magnitude wait for it."""
        for each in work:
            bundle = each.work if isinstance(each, Streamed) else each
            if isinstance(bundle, Bundle) and bundle.tensor in self._work.reaches:
                self._survey.wait(each)
            else:
                self._todo.append(each)
        self._todo.extend(self._survey.ready())

    def _read_ahead(self, name: str) -> None:
        if self._survey.ask_ahead(name):
            self._supply.read_ahead(name)
