"""A batch from beginning to end: look what there is to do, do it model by model, try again what failed in passing."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from multiprocessing import connection
from typing import Final, Protocol

from shardq.batch.collecting import Collector
from shardq.batch.errand import Errand, Made
from shardq.batch.manifest import Entry, Manifest, Model
from shardq.batch.process import do_errand
from shardq.batch.room import Room, find_room
from shardq.batch.schedule import kind_of
from shardq.batch.standing import first_standing, next_standing
from shardq.batch.state import NAME, Standing, StatusFile, Trouble
from shardq.batch.up_to_date import Look, look_at_all, make_client
from shardq.errors import (
    BatchLocked,
    BatchOverBudget,
    BatchPartlyFailed,
    BatchUnfinished,
    BudgetTooSmall,
    OutputLocked,
    ShardqError,
)
from shardq.files.atomic import writing
from shardq.lock import FolderLock
from shardq.progress import Progress
from shardq.signals import StopFlag

LOCK: Final = "lock"
NAMED: Final = 3  # entries in a message


class Telling(Protocol):
    """Whoever wants to know how a batch goes on."""

    def looked(self, looks: Sequence[Look]) -> None:
        """What there is to do."""
        ...

    def begins(self, model: Model, entries: Sequence[Entry]) -> None:
        """A model's outputs are made, or gone on with."""
        ...

    def step(self, progress: Progress) -> None:
        """A step of it."""
        ...

    def ended(self, entry: Entry, standing: Standing) -> None:
        """An entry is done, or has failed."""
        ...

    def waits(self, wait_s: float) -> None:
        """Nothing can be done before so many seconds have passed."""
        ...


class Silence:
    """Tells nobody."""

    def looked(self, looks: Sequence[Look]) -> None:
        """Nothing."""

    def begins(self, model: Model, entries: Sequence[Entry]) -> None:
        """Nothing."""

    def step(self, progress: Progress) -> None:
        """Nothing."""

    def ended(self, entry: Entry, standing: Standing) -> None:
        """Nothing."""

    def waits(self, wait_s: float) -> None:
        """Nothing."""


@dataclass(frozen=True, slots=True)
class Row:
    """What became of an entry."""

    model: Model
    entry: Entry
    standing: Standing
    look: Look
    tried: bool  # in this run


def plan_batch(manifest: Manifest) -> list[Row]:
    """What a run would do, and why; changes nothing."""
    status = _open_status(manifest)
    looks = look_at_all(manifest.models, status)
    return [
        Row(m, e, first_standing(status.get(e.label), m, looks[e.label], manifest.patience), looks[e.label], False)
        for m in manifest.models
        for e in m.entries
    ]


def run_batch(manifest: Manifest, once: bool, telling: Telling) -> list[Row]:
    """Do all that there is to do. `once`: one attempt for each model, and no waiting.

    Failures of entries are in the rows. Raises BatchLocked, Interrupted and Terminated, NotWritable, DiskFull, and
    BadOption for a status file that cannot be read.
    """
    with writing(manifest.folder):
        manifest.folder.mkdir(parents=True, exist_ok=True)
    lock = FolderLock(manifest.folder / LOCK)
    try:
        lock.acquire()
    except OutputLocked as error:
        raise BatchLocked(f"{str(error).partition(';')[0]}; it goes on, and nothing was done here") from error
    try:
        with StopFlag() as stop:
            return _Batch(manifest, once, telling, stop).run()
    finally:
        lock.release()


def judge_rows(rows: Sequence[Row]) -> ShardqError | None:
    """The error that a batch ends with; None if all is done."""
    failed = [r for r in rows if r.standing.state == "failed" or (r.standing.state == "done" and r.standing.error)]
    waiting = [r for r in rows if r.standing.state == "waiting"]
    if failed:
        budget = all(r.standing.error and r.standing.error.type == BudgetTooSmall.__name__ for r in failed)
        kind = BatchOverBudget if budget else BatchPartlyFailed
        return kind(f"{len(failed)} of {len(rows)} outputs failed: {_names(failed)}; the status file says why")
    if waiting:
        return BatchUnfinished(f"{len(waiting)} of {len(rows)} outputs are to be tried again: {_names(waiting)}")
    return None


def _names(rows: Sequence[Row]) -> str:
    return ", ".join(r.entry.label for r in rows[:NAMED]) + (", ..." if len(rows) > NAMED else "")


def _open_status(manifest: Manifest) -> StatusFile:
    labels = [e.label for m in manifest.models for e in m.entries]
    return StatusFile(manifest.folder / NAME, str(manifest.path), labels)


class _Batch:
    """A run of a manifest whose lock is held."""

    def __init__(self, manifest: Manifest, once: bool, telling: Telling, stop: StopFlag) -> None:
        self._manifest, self._once, self._telling, self._stop = manifest, once, telling, stop
        self._status = _open_status(manifest)
        self._looks: dict[str, Look] = {}
        self._attempts = [0] * len(manifest.models)  # of this run
        self._tried: set[str] = set()

    def run(self) -> list[Row]:
        models = self._manifest.models
        self._look(models)
        self._telling.looked(list(self._looks.values()))
        while (number := self._next()) is not None:
            self._attempts[number] += 1
            self._attempt(models[number])
            self._heed()
        self._give_up()
        self._collect()
        entries = [(m, e) for m in models for e in m.entries]
        return [Row(m, e, self._standing(e), self._looks[e.label], e.label in self._tried) for m, e in entries]

    def _look(self, models: Sequence[Model]) -> None:
        looks = look_at_all(models, self._status)
        self._looks |= looks
        patience = self._manifest.patience
        entries = [(m, e) for m in models for e in m.entries]
        self._status.put(
            {e.label: first_standing(self._status.get(e.label), m, looks[e.label], patience) for m, e in entries}
        )

    def _standing(self, e: Entry) -> Standing:
        found = self._status.get(e.label)
        assert found is not None
        return found

    def _todo(self, model: Model) -> list[Entry]:
        return [e for e in model.entries if self._standing(e).state == "waiting"]

    def _next(self) -> int | None:
        """The model whose turn it is: the first that need not wait, else, after a wait, the one that waits least."""
        limit = 1 if self._once else self._manifest.patience.attempts
        now = time.time()
        due = {
            number: max(now, *(self._standing(e).next_try or 0.0 for e in self._todo(model)))
            for number, model in enumerate(self._manifest.models)
            if self._attempts[number] < limit and self._todo(model)
        }
        if not due:
            return None
        number = min(due, key=lambda n: (due[n], n))
        if due[number] > now:
            if self._once:
                return None
            self._telling.waits(due[number] - now)
            connection.wait([self._stop.ready], due[number] - now)
            self._heed()
        return number

    def _attempt(self, model: Model) -> None:
        """Make what is left to make of a model."""
        if any(self._looks[e.label].error for e in self._todo(model)):
            self._look([model])
        entries = [e for e in self._todo(model) if not self._looks[e.label].error]
        if not entries:
            return
        self._telling.begins(model, entries)
        self._tried.update(e.label for e in entries)
        self._status.put({e.label: replace(self._standing(e), state="running", error=None) for e in entries})
        room, began_s = find_room(self._manifest, entries), time.monotonic()
        commit = self._looks[entries[0].label].commit
        errand = Errand(model.source, commit, model.subfolder, tuple(entries), room.limits)
        made = do_errand(errand, self._telling.step, self._stop)
        seconds = time.monotonic() - began_s
        found = {m.label: self._judge(m, room, seconds) for m in made}
        self._status.put(found)
        for e in entries:
            self._telling.ended(e, found[e.label])

    def _judge(self, made: Made, room: Room, seconds: float) -> Standing:
        before = self._status.get(made.label)
        assert before is not None
        trouble = made.trouble
        crowded = trouble is not None and trouble.type == BudgetTooSmall.__name__ and room.held_bytes > 0
        if trouble and crowded:
            held = f"{room.held_bytes / 1e9:.1f} GB are held by other outputs that are not finished"
            trouble = Trouble(trouble.type, f"{trouble.message}; {held}")
        passing = trouble is not None and (crowded or kind_of(trouble.type) == "passing")
        return replace(
            next_standing(before, trouble, passing, self._manifest.patience, self._stop.signal is not None),
            pushed_commit=made.pushed_commit or before.pushed_commit,
            seconds=round(seconds, 1),
        )

    def _give_up(self) -> None:
        """What still waits after all attempts has failed; with `once` the next run goes on."""
        if self._once:
            return
        left = [e for m in self._manifest.models for e in self._todo(m)]
        self._status.put({e.label: replace(self._standing(e), state="failed", next_try=None) for e in left})

    def _collect(self) -> None:
        """Put what is published into its collection, where that was not done before."""
        wanted = [
            e
            for m in self._manifest.models
            for e in m.entries
            if e.collection and self._standing(e).state == "done" and self._standing(e).collection != e.collection
        ]
        if not wanted:
            return
        collector = Collector(make_client())
        for e in wanted:
            self._heed()
            try:
                collector.add(e)
                changed = replace(self._standing(e), collection=e.collection)
            except ShardqError as error:
                changed = replace(self._standing(e), error=Trouble(type(error).__name__, str(error)))
                self._telling.ended(e, changed)
            self._status.put({e.label: changed})

    def _heed(self) -> None:
        self._stop.heed("what is finished is kept: run the same command again to go on")
