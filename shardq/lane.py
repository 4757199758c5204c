"""One output of a run: its plan, its folder, its journal, and how far it is. Knows nothing of workers and transfers."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shardq.block_tasks import BlocksTask, VectorsTask
from shardq.destinations.base import StoredFile
from shardq.figures import write_figures
from shardq.journal import Journal
from shardq.onepass import OnePass
from shardq.plans import OutputFile, Plan
from shardq.staging import Progressed, Staging
from shardq.tasks import Bundle, Done, Member, Sealed, Task

if TYPE_CHECKING:
    from shardq.loans import Digest, Pair
    from shardq.settling import Settling
    from shardq.uploader import Uploader


@dataclass(frozen=True, slots=True)
class Finished:
    """What a completed lane leaves for publishing."""

    done: Mapping[int, Done]
    sealed: Mapping[str, tuple[str, int]]  # file -> sha256, size


class Lane:
    """An output while it is made. A file is sealed when all its tasks are done; a task of a sealed file is over."""

    def __init__(
        self,
        number: int,
        plan: Plan,
        staging: Staging,
        journal: Journal,
        before: Progressed,
        uploader: "Uploader | None",
        destination: str | None,
    ) -> None:
        self.number, self.plan, self.staging, self.uploader = number, plan, staging, uploader
        self.before = before
        self._journal, self._destination = journal, destination
        self.files: Mapping[str, OutputFile] = {f.name: f for f in plan.files}
        self._of_shard: dict[str, list[OutputFile]] = {}
        for file in plan.files:
            for shard in file.shards:
                self._of_shard.setdefault(shard, []).append(file)
        self.sealed: dict[str, tuple[str, int]] = dict(before.sealed)
        self.uploaded: set[str] = set(before.uploaded)
        self._done: dict[int, Done] = dict(before.tasks)
        self._left = dict.fromkeys(self.files, 0)  # tasks of this run still to finish
        self._shard_tasks: dict[str, list[Task]] = {s.name: [] for s in plan.checkpoint.shards}
        self._settling = _open_settling(plan, before.settled) if plan.settles else None
        for task in plan.tasks:
            self._shard_tasks[task.shard].append(task)
            for name in () if self.is_settled(task.shard) else task.files:
                self._left[name] += 1
        self.is_trusted = True  # False: what is read back may never have reached the disk
        self._journaled: set[int] = set()  # tasks of streamed shards
        self._amax: dict[str, float] = {}  # recorded
        self._begun: set[str] = set()  # files that have their size and header
        self._sealing: set[str] = set()

    @property
    def finished(self) -> Finished:
        """What there is to publish."""
        return Finished(self._done, self.sealed)

    @property
    def is_over(self) -> bool:
        """True when all files are sealed and, with a destination, uploaded."""
        return len(self.sealed) == len(self.files) and (self.uploader is None or len(self.uploaded) == len(self.files))

    def files_of(self, shard: str) -> list[OutputFile]:
        """Files that need a source shard."""
        return self._of_shard.get(shard, [])

    def needs(self, shard: str) -> bool:
        """True while some file that needs this source shard is not sealed, or what was made of it not settled."""
        if self._settling:
            return self._settling.needs(shard, self.sealed)
        return any(f.name not in self.sealed for f in self.files_of(shard))

    def member(self, task: Task) -> Member | None:
        """What is left of a task: nothing when its files are sealed; a check when an interrupted run has done it."""
        unsealed = [f for f in task.files if f not in self.sealed]
        if not unsealed or self.is_settled(task.shard):
            return None
        if len(unsealed) < len(task.files):
            assert isinstance(task, BlocksTask | VectorsTask)
            return Member(self.number, task.without(self.sealed.keys() & set(task.files)))
        kept = task.id in self._done and all(self.staging.has_part(self.files[f]) for f in unsealed)
        return Member(self.number, task, self._done[task.id] if kept else None)

    def begin(self, name: str) -> None:
        """Make an output file; only when its first task starts, so that disk is taken as it is freed."""
        if name not in self._begun and name not in self.sealed:
            self.staging.begin(self.files[name])
            self._begun.add(name)

    def take(self, done: Done, journal: bool) -> None:
        """A task is done; `journal`: its source bytes are known to have been right."""
        if journal:
            if not done.reused:
                self._journal_task(done)
            self._journaled.add(done.id)
        self._done[done.id] = done
        self._count(done.id, -1)

    def journal_shard(self, shard: str, amax: Mapping[str, float], is_right: Callable[[Task], bool]) -> None:
        """Record the tasks of a source shard that have read nothing wrong, and magnitudes that were found in it. May be
        called again when more is known to be right."""
        for name, value in amax.items():
            self.record_amax(name, value)
        for task in self._shard_tasks[shard]:
            over = task.id in self._journaled or all(f in self.sealed for f in task.files)
            done = None if over else self._done.get(task.id)
            if done and is_right(task):
                self._journaled.add(task.id)
                if not done.reused:
                    self._journal_task(done)

    def record_amax(self, tensor: str, amax: float) -> None:
        """The largest magnitude of a tensor whose bytes were verified, if it is of use here."""
        if tensor in self.plan.reaches and self._amax.get(tensor) != amax:
            self._amax[tensor] = amax
            self._journal.append({"event": "amax", "tensor": tensor, "value": amax}, durable=False)

    def record_lent(self, digests: "Mapping[Pair, Digest]") -> None:
        """What a source shard that was verified lends."""
        for (home, donor), digest in digests.items():
            event = {"event": "lent", "to": home, "shard": donor, "sha256": digest.sha256}
            self._journal.append(event, durable=False)

    def forget(self, number: int) -> bool:
        """A task has ended, but its source came wrong: it has to be done again. True if it had been done."""
        self._count(number, 1)
        return self._done.pop(number, None) is not None

    def count_failed(self, number: int) -> None:
        """A task ended with an error that is not believed yet."""
        self._count(number, -1)

    def _count(self, number: int, change: int) -> None:
        for file in self.plan.tasks[number].files:
            self._left[file] += change

    def is_made(self, name: str) -> bool:
        """True when nothing is left to do for a file but to seal it, and that may begin and has not."""
        if self._left[name] or name in self.sealed or name in self._sealing:
            return False
        return self._settling is None or not self._settling.is_busy(name)

    def doubtful(self, name: str) -> Iterable[str]:
        """Source shards that must be known to be right before a file is sealed."""
        return self._settling.doubtful(name) if self._settling else self.files[name].shards

    def begin_seal(self, name: str) -> None:
        """A file that is made is about to be sealed."""
        self.begin(name)
        self._sealing.add(name)

    def seal(self, sealed: Sealed) -> None:
        """A file is durable in `part`: settle it and record that."""
        file = self.files[sealed.file]
        self.staging.settle(file.name)
        self._journal.append(
            {"event": "sealed", "file": file.name, "sha256": sealed.sha256, "size": file.size_bytes}, durable=True
        )
        self.sealed[file.name] = (sealed.sha256, file.size_bytes)
        self._upload(file.name, self.staging.ready / file.name)

    def to_settle(self, shard: str) -> tuple[str, ...] | None:
        """Files to be made durable now that all that becomes of a source shard is made and recorded, so that it may go
        before they are sealed; None if it is not, or if that has begun or has to wait for a file that is being sealed.
        """
        if not self._settling or self._settling.is_begun(shard):
            return None
        files = self._settling.files(shard) - self.sealed.keys()
        tasks = self._shard_tasks[shard]
        if not files or not files.isdisjoint(self._sealing):
            return None
        if not all(t.id in self._journaled or all(f in self.sealed for f in t.files) for t in tasks):
            return None
        self._settling.begin(shard, files)
        return tuple(sorted(files))

    def settle(self, shard: str) -> tuple[frozenset[str], frozenset[str]]:
        """What was made of a source shard is durable: record that. Returns the files that have it, and the shards that
        it was made of."""
        assert self._settling
        self._journal.append({"event": "settled", "shard": shard}, durable=True)
        return self._settling.end(shard), self._settling.reads(shard)

    def is_settled(self, shard: str) -> bool:
        """True if all that was made of a shard is durable and recorded before its files are sealed."""
        return self._settling is not None and self._settling.has(shard)

    def distrust(self) -> None:
        """The disk has refused to make something durable: what is neither settled nor sealed may be lost, though it
        can still be read. Record that, and nothing made before or after; a plan that does not settle has deleted the
        file instead."""
        if self._settling and self.is_trusted:
            self.is_trusted = False
            self._journal.append({"event": "distrust"}, durable=True)

    def record_fetched(self, shard: str, sha256: str) -> None:
        """A source shard is here and was verified."""
        self._journal.append({"event": "fetched", "shard": shard, "sha256": sha256}, durable=False)

    def record_freed(self, shard: str) -> None:
        """A source shard is deleted."""
        self._journal.append({"event": "freed", "shard": shard}, durable=False)

    def record_uploaded(self, name: str) -> None:
        """A file is in the destination's storage."""
        self._journal.append({"event": "uploaded", "file": name, "to": self._destination}, durable=True)
        self.uploaded.add(name)

    @property
    def made(self) -> frozenset[str]:
        """Files that an earlier run has sealed, or has only left to be sealed."""
        return frozenset(f for f in self.files if f in self.sealed or (self._settling and self._left[f] == 0))

    @property
    def held(self) -> frozenset[str]:
        """Unfinished files that have in them what was made of settled shards, and may be all that is left of these."""
        return self._settling.held(self.sealed) if self._settling else frozenset()

    def trim(self, counted: Collection[str]) -> None:
        """Delete unfinished files of an earlier run that are not among the `counted`."""
        self.staging.trim_parts(self.held.union(counted, self.made))

    def resume_uploads(self, keep_local: bool) -> None:
        """Send what an interrupted run had sealed, and drop what it had sent."""
        for name in self.sealed if self.uploader else ():
            if name not in self.uploaded:
                self._upload(name, self.staging.find(name))
            elif not keep_local:
                self.staging.drop(name)  # a crash may have come between the journal line and the deletion

    def _upload(self, name: str, path: Path) -> None:
        if self.uploader:
            sha256, size_bytes = self.sealed[name]
            self.uploader.submit(path, StoredFile(name, size_bytes, sha256))

    def _journal_task(self, done: Done) -> None:
        if self.is_trusted:
            self._journal.append(task_event(done), durable=False)


def find_left(work: OnePass, lanes: Sequence[Lane]) -> Mapping[str, Sequence[Bundle]]:
    """By source shard the bundles with something left to do, of each lane what is left of its own."""
    left: dict[str, list[Bundle]] = {s.name: [] for s in work.checkpoint.shards}
    for bundle in work.bundles:
        members = tuple(m for lane, own in zip(lanes, bundle.members, strict=True) if (m := lane.member(own.task)))
        if members:
            left[bundle.shard].append(replace(bundle, members=members))
    return left


def task_event(done: Done) -> dict[str, Any]:
    """What a journal says of a task that is done."""
    more: dict[str, Any] = {} if done.amax is None else {"amax": done.amax}
    more |= write_figures(done.figures, done.losses)
    return {"event": "task", "id": done.id, "checksum": done.checksum, **more}


def _open_settling(plan: "Plan", settled: Collection[str]) -> "Settling":
    from shardq.settling import Settling  # GGUF files alone need it

    return Settling(plan, settled)
