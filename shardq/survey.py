"""What a run knows of the largest magnitudes of tensors, and which work waits for one.

Schemes with a scale for a whole tensor or a fused group need it before the first code. Magnitudes of what is at hand
are found by workers; range mode reads tensors that lie in another piece ahead, from the source.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from shardq.checkpoint import TensorRef
from shardq.cut import slabs
from shardq.onepass import OnePass
from shardq.tasks import Bundle, Member, QuantizeTask, Streamed, Surveyed, SurveyTask

if TYPE_CHECKING:
    from shardq.carry import Goal

Waiting = Bundle | Streamed
Key = tuple[str, int | None]  # a tensor's magnitude, or that of its slab of that key


class Survey:
    """Magnitudes by tensor. One that was read ahead, not verified, counts until the verified one contradicts it."""

    def __init__(self, work: OnePass, known: Mapping[str, float]) -> None:
        """`known`: verified magnitudes that an interrupted run found."""
        self._work = work
        self._known = dict(known)
        self._found: dict[str, dict[int, float]] = {}  # tensor -> key of a slab -> magnitude
        self._found_in: dict[str, set[str]] = {}  # shard -> tensors of which something was found
        self._ahead: dict[str, float] = {}
        self._used: dict[str, float] = {}  # what tasks were given
        self._users: dict[str, set[str]] = {}  # by tasks of which shards
        self._asked: set[Key] = set()
        self._missing: dict[int, set[Key]] = {}  # bundle -> what it waits for
        self._held: dict[int, Waiting] = {}  # those bundles
        self._waiting: dict[Key, list[Waiting]] = {}
        self._ready: list[Waiting] = []

    def needed(self, bundles: Iterable[Bundle]) -> set[str]:
        """Tensors whose magnitudes these need."""
        return {name for b in bundles for name in self._work.reaches.get(b.tensor, ())}

    def tasks(self, names: Iterable[str], extent: tuple[int, int] | None = None) -> list[SurveyTask]:
        """What there is to do for the magnitudes of these tensors, given once; only slabs inside `extent`, if given."""
        tasks: list[SurveyTask] = []
        for name in sorted(names):
            for task in self._tasks(name):
                first, behind = task.extent
                begin, end = extent or task.extent
                key = (name, task.key)
                inside = begin <= first and behind <= end
                if inside and name not in self._known and key not in self._asked:
                    self._asked.add(key)
                    tasks.append(task)
        return tasks

    def expects(self, name: str) -> bool:
        """True if a tensor's magnitude is known, or will be from what has been given out."""
        return self.knows(name) or all((name, task.key) in self._asked for task in self._tasks(name))

    def ask_ahead(self, name: str) -> bool:
        """True the first time that a tensor has to be read ahead."""
        is_new = (name, None) not in self._asked and not self.knows(name)
        self._asked.add((name, None))
        return is_new

    def knows(self, name: str) -> bool:
        """True if tasks may be given this tensor's magnitude."""
        return self._value(name) is not None

    def wait(self, work: Waiting) -> None:
        """Keep work until `ready` gives it: until all magnitudes are known that it needs, and its own bytes, whose
        memory may go after it, are measured."""
        bundle = _bundle_of(work)
        missing: set[Key] = {(n, None) for n in self.needed((bundle,)) if not self.knows(n)}
        own = bundle.key
        if bundle.tensor not in self._known and own not in self._found.get(bundle.tensor, ()):
            missing.add((bundle.tensor, own))
        if not missing:
            self._ready.append(work)
            return
        self._missing[bundle.id], self._held[bundle.id] = missing, work
        for key in missing:
            self._waiting.setdefault(key, []).append(work)

    def ready(self) -> list[Waiting]:
        """Work that waits no longer, with its magnitudes filled in."""
        ready, self._ready = self._ready, []
        return [
            replace(w, work=self._fill(_bundle_of(w))) if isinstance(w, Streamed) else self._fill(_bundle_of(w))
            for w in ready
        ]

    def take(self, surveyed: Surveyed) -> float | None:
        """A slab's magnitude; returns the tensor's when it was the last."""
        name = surveyed.tensor
        self._found.setdefault(name, {})[surveyed.key] = surveyed.amax
        self._found_in.setdefault(self._work.tensors[name].shard, set()).add(name)
        self._resolve((name, surveyed.key))
        measured = self._measured(name)
        if measured is not None:
            self._resolve((name, None))
        return measured

    def take_ahead(self, name: str, amax: float) -> None:
        """A tensor's magnitude, read from a source before its shard was verified."""
        self._ahead[name] = amax
        self._resolve((name, None))

    def measured(self, shard: str) -> dict[str, float]:
        """Magnitudes of a shard's tensors that were found in its own bytes."""
        found = {n: self._measured(n) for n in self._found_in.get(shard, ())}
        return {n: value for n, value in found.items() if value is not None}

    def contradicted(self, shard: str) -> list[str]:
        """Tensors of a verified shard whose magnitude is not what tasks were given."""
        return [n for n, value in self.measured(shard).items() if self._used.get(n, value) != value]

    def forget(self, shard: str) -> list[str]:
        """Forget what was found in a shard that came wrong. Returns what others wait for that had counted on it: it has
        to be read ahead, as waiting for the shard to come again would keep memory that it needs."""
        for name in self._found_in.pop(shard, set()):
            self._asked -= {(name, key) for key in self._found.pop(name)}
            if name not in self._ahead and self._users.get(name, {shard}) == {shard}:
                self._used.pop(name, None)  # its own tasks are done again; others' would be contradicted
        lost: set[str] = set()
        for number, work in self._held.items():
            for name in sorted(self.needed((_bundle_of(work),))):
                if (name, None) not in self._missing[number] and not self.knows(name):
                    self._missing[number].add((name, None))
                    self._waiting.setdefault((name, None), []).append(work)
                    lost.add(name)
        return sorted(lost)

    def _resolve(self, key: Key) -> None:
        for work in self._waiting.pop(key, ()):
            number = _bundle_of(work).id
            missing = self._missing.get(number)
            if missing is None:
                continue
            missing.discard(key)
            if not missing:
                del self._missing[number], self._held[number]
                self._ready.append(work)

    def _measured(self, name: str) -> float | None:
        parts = self._found.get(name, {})
        if not parts or len(parts) < len(self._tasks(name)):
            return None
        return max(parts.values())

    def _tasks(self, name: str) -> tuple[SurveyTask, ...]:
        return survey_tasks(self._work.tensors[name], self._work.rounds, self._work.goals.get(name))

    def _value(self, name: str) -> float | None:
        for values in (self._used, self._known, self._ahead):
            if name in values:
                return values[name]
        return self._measured(name)

    def _fill(self, bundle: Bundle) -> Bundle:
        return replace(bundle, members=tuple(self._filled(m) for m in bundle.members))

    def _filled(self, member: Member) -> Member:
        task = member.task
        reach = self._work.plans[member.lane].reaches.get(task.tensor) if isinstance(task, QuantizeTask) else None
        if reach is None or not isinstance(task, QuantizeTask):
            return member
        for name in reach:
            value = self._value(name)
            assert value is not None, f"{name} was not measured"
            self._used[name] = value
            self._users.setdefault(name, set()).add(task.shard)
        largest = max(reach, key=lambda n: self._used[n])
        return replace(member, task=replace(task, amax=self._used[largest], amax_of=largest))


def survey_tasks(t: TensorRef, rounds: bool, goal: "Goal | None") -> tuple[SurveyTask, ...]:
    """The slabs of a matrix, to be measured; `rounds` and `goal` as in SurveyTask."""
    assert t.dtype is not None
    assert t.shape is not None
    columns = t.shape[1]
    if not t.encoded:
        return tuple(SurveyTask(t.shard, t.name, t.dtype, p.begin, p.size_bytes, columns) for p in slabs(t))
    (e,) = t.encoded
    return tuple(
        SurveyTask(t.shard, t.name, t.dtype, p.begin, p.size_bytes, columns, *p.rows, e, rounds, goal)
        for p in slabs(t)
        if p.rows
    )


def _bundle_of(work: Waiting) -> Bundle:
    bundle = work.work if isinstance(work, Streamed) else work
    assert isinstance(bundle, Bundle)
    return bundle
