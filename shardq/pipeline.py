"""Runs one pass: bring source shards, hand bundles to workers, seal finished files, free source shards, upload.

Order of events for an output file: all its tasks -> fsync and hash in `part` -> rename to `ready` -> fsync of the
folder -> journal line, fsync -> only then are its source shards freed -> upload, journal line, fsync -> only then is
the output file freed. A crash loses at most unjournaled tasks.
"""

import logging
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from shardq.account import open_account
from shardq.admission import Admission, ShardCost
from shardq.checkpoint import Shard
from shardq.errors import ChecksumMismatch, ShardqError
from shardq.executors.base import Executor, Outcome
from shardq.fetcher import Fetched
from shardq.jobs import Jobs, Work
from shardq.lane import Lane
from shardq.limits import Limits
from shardq.onepass import OnePass
from shardq.plans import OutputFile
from shardq.progress import Progress, Report, Stage
from shardq.proofs import Proofs, find_proven
from shardq.seals import Seals
from shardq.signals import StopFlag
from shardq.sources.base import Source
from shardq.spans import cut_all
from shardq.supply import Supply
from shardq.survey import Survey
from shardq.tasks import (
    Bundle,
    BundleDone,
    SealDone,
    Sealed,
    SealTask,
    Settled,
    SettleTask,
    Streamed,
    Surveyed,
    Task,
    Unsealed,
)

if TYPE_CHECKING:
    from shardq.ahead import AheadReader
    from shardq.lender import Lent
    from shardq.loans import Digest, Pair
    from shardq.streamer import Passed, Piece
    from shardq.uploader import Uploaded

logger = logging.getLogger(__name__)
POLL_S: Final = 1.0  # longest wait without looking at the stop flag


class Pipeline:
    """One pass over a source for the outputs of a run."""

    def __init__(
        self, work: OnePass, source: Source, lanes: Sequence[Lane], limits: Limits, slots: int, report: Report
    ) -> None:
        """`lanes`: one for each plan of `work`, in order. Fetched shards are staged in the folder of the first."""
        self._work, self._source, self._lanes = work, source, lanes
        self._limits, self._report = limits, report
        self._shards: Mapping[str, Shard] = {s.name: s for s in work.checkpoint.shards}
        self._bundles: dict[str, list[Bundle]] = {name: [] for name in self._shards}
        for bundle in work.bundles:
            left = tuple(m for lane, own in zip(lanes, bundle.members, strict=True) if (m := lane.member(own.task)))
            if left:
                self._bundles[bundle.shard].append(replace(bundle, members=left))
        self._open = {name: {b.id for b in bundles} for name, bundles in self._bundles.items()}  # not ended yet
        self._todo: deque[Work] = deque()
        self._seals = Seals(source.remote or any(lane.uploader for lane in lanes))
        self._passed: set[str] = set()  # streamed shards whose hash was right
        self._wrong: set[str] = set()  # streamed shards whose hash was wrong, to be done again
        self._suspect: dict[str, tuple[ShardqError, Bundle]] = {}  # of streamed shards that are not known to be right
        self._error: ShardqError | None = None
        loans = {n: own for n, own in work.loans.items() if self._bundles[n]} if slots else {}
        sizes = {s.name: s.size_bytes for s in self._shards.values()}
        self._supply = Supply(source, lanes[0].staging, slots, cut_all(work) if slots else {}, loans, sizes)
        known = {pair: sha256 for lane in lanes for pair, sha256 in lane.before.lent.items()}
        self._proofs = Proofs((loan for own in loans.values() for loan in own), known)
        amax = {n: value for lane in lanes for n, value in lane.before.amax.items()}
        self._survey = Survey(work, amax)
        self._wanted: dict[str, set[str]] = {}  # shard -> its tensors whose magnitudes are needed
        for name in self._survey.needed(b for bundles in self._bundles.values() for b in bundles):
            self._wanted.setdefault(work.tensors[name].shard, set()).add(name)
        self._jobs = Jobs(len(work.bundles), [list(lane.files) for lane in lanes])
        self._reads = {  # shard -> all shards that its bundles read
            name: frozenset({name}).union(*(b.shards for b in bundles)) for name, bundles in self._bundles.items()
        }
        busy = [name for name, bundles in self._bundles.items() if bundles]
        asked = {s.name for own in self._wanted.values() for n in own - amax.keys() for s in self._shards_of(n)}
        self._proven = find_proven(lanes, busy, self._proofs, asked) if slots else frozenset()
        self._passed |= self._proven
        self._over = self._proven | {s for s in self._shards if s not in busy and not any(x.needs(s) for x in lanes)}
        self._owners: Mapping[tuple[int, str], str] = {}  # file of a lane -> the shard that it begins with
        self._waiting: dict[str, Shard] = {}  # shards at hand whose bundles read others that are not
        self._ahead: AheadReader | None = None
        self._admission: Admission
        self._total_bytes = work.work_bytes
        begun = sum(b.source_bytes for bundles in self._bundles.values() for b in bundles)
        self._resumed_bytes = work.work_bytes - begun
        self._done_bytes = self._resumed_bytes

    def run(self, executor: Executor, stop: StopFlag) -> None:
        """Do everything that is left. Raises Interrupted, Terminated, or the first error of a task or transfer."""
        self._tell("start", "")
        staged = {name: self._supply.staged_bytes(shard) for name, shard in self._shards.items()}
        account = open_account(self._work, self._lanes, staged, self._over, self._limits, self._source.remote)
        self._admission, self._owners = account.admission, account.owners
        self._resume()
        while not all(lane.is_over for lane in self._lanes) or executor.unfinished():
            if stop.signal or self._error:
                self._drain(executor, stop)
            self._step(executor, stop)

    def close(self) -> None:
        """Stop all transfers; only after the workers, which may read what a transfer has brought."""
        self._supply.close()
        if self._ahead:
            self._ahead.close()
        for lane in self._lanes:
            if lane.uploader:
                lane.uploader.close()

    # --- loop ------------------------------------------------------------------------------------------------------

    def _step(self, executor: Executor, stop: StopFlag) -> None:
        """Begin what may begin, wait for something to happen, and take it in."""
        self._bring(iter(self._admission.next, None))
        self._take()
        if task := self._seals.take(is_idle=not self._todo and not executor.unfinished()):
            self._todo.appendleft(task)
        while self._todo and executor.room() > 0:
            work = self._todo.popleft()
            self._begin(work)
            executor.submit(self._jobs.job(work))
        also = [stop.ready, *self._supply.ready, *(x.uploader.ready for x in self._lanes if x.uploader)]
        if self._ahead:
            also.append(self._ahead.ready)
        for outcome in executor.wait(POLL_S, also):
            self._collect(outcome)
        self._take()
        if self._supply.ready:
            self._tell("fetch", "")

    def _take(self) -> None:
        """Everything that transfers have brought."""
        for news in self._supply.take():
            if isinstance(news, Fetched):
                self._on_fetched(news)
            else:
                self._on_streamed(news)
        for seen in self._ahead.take() if self._ahead else ():
            self._error = self._error or seen.error
            if not seen.error:
                self._survey.take_ahead(seen.tensor, seen.amax)
                self._todo.extend(self._survey.ready())
        for lane in self._lanes:
            for uploaded in lane.uploader.take() if lane.uploader else ():
                self._on_uploaded(lane, uploaded)

    def _on_streamed(self, news: "Piece | Passed | Lent") -> None:
        from shardq.streamer import Passed, Piece  # range mode alone has them

        if isinstance(news, Piece):
            self._on_piece(news)
        elif isinstance(news, Passed):
            self._on_passed(news)
        else:
            self._on_lent(news)

    def _drain(self, executor: Executor, stop: StopFlag) -> None:
        """Let running tasks finish, keep what they did, and raise."""
        executor.cancel_queued()
        while executor.unfinished():
            for outcome in executor.wait(POLL_S):
                self._collect(outcome)
        if self._error:
            raise self._error
        percent = 100 * self._done_bytes // max(1, self._total_bytes)
        folders = ", ".join(str(lane.staging.work) for lane in self._lanes)
        stop.heed(f"{percent} % is done and kept in {folders}: run the same command again to resume")

    def _begin(self, work: Work) -> None:
        """Make the files that a bundle writes into."""
        what = work.work if isinstance(work, Streamed) else work
        for m in what.members if isinstance(what, Bundle) else ():
            for file in m.task.files:
                self._lanes[m.lane].begin(file)

    # --- work ------------------------------------------------------------------------------------------------------

    def _collect(self, outcome: Outcome) -> None:
        match outcome.result:
            case None:
                assert outcome.error is not None
                self._on_failed(outcome.job.work, outcome.error)
            case SealDone() as sealed:
                for file in sealed.files:
                    self._on_sealed(file)
            case Settled() as settled:
                self._on_settled(settled)
            case Surveyed() as surveyed:
                self._on_surveyed(surveyed)
            case BundleDone() as done:
                self._on_done(done)
            case other:
                raise TypeError(f"a worker answered {other!r}")

    def _on_failed(self, work: object, error: ShardqError) -> None:
        """The run ends, unless the work may have read wrong bytes: then the hashes of its shards decide."""
        if isinstance(work, Streamed) and isinstance(work.work, Bundle) and not self._has_read_right(work.work):
            bundle = work.work
            self._suspect.setdefault(bundle.shard, (error, bundle))
            for m in bundle.members:
                self._lanes[m.lane].count_failed(m.task.id)
            self._end(bundle)
        else:
            for number in work.lanes if isinstance(work, SealTask | SettleTask) else ():
                self._lanes[number].distrust()
            self._error = self._error or error

    def _on_surveyed(self, surveyed: Surveyed) -> None:
        """A tensor's magnitude may be complete; that of a verified shard is recorded."""
        amax = self._survey.take(surveyed)
        if amax is not None and not self._supply.is_streamed(self._shard_of(surveyed.tensor)):
            for lane in self._lanes:
                lane.record_amax(surveyed.tensor, amax)
        self._todo.extendleft(reversed(self._survey.ready()))

    def _on_done(self, report: BundleDone) -> None:
        bundle = self._work.bundles[report.id]
        streamed = self._supply.is_streamed(self._shards[bundle.shard])
        for number, done in report.done:
            self._lanes[number].take(done, journal=not streamed)
        if all(done.reused for _, done in report.done):
            self._resumed_bytes += bundle.source_bytes
        self._done_bytes += bundle.source_bytes
        self._end(bundle)
        self._tell("work", bundle.shard)

    def _end(self, bundle: Bundle) -> None:
        """A bundle needs its source no more."""
        self._supply.settle(bundle)
        self._open[bundle.shard].discard(bundle.id)
        self._look(self._shards[bundle.shard])

    def _look(self, shard: Shard) -> None:
        """See what a shard's state allows: to believe what was made of it, to do it again, to seal files."""
        if not self._open[shard.name] and self._supply.is_streamed(shard):
            if shard.name in self._wrong:
                self._do_again(shard)
                return
            if shard.name in self._passed and not self._believe(shard):
                return
        for lane in self._lanes:
            for file in lane.files_of(shard.name):
                self._seal_made(lane, file)
            self._settle_made(lane, shard.name)

    def _seal_made(self, lane: Lane, file: OutputFile) -> None:
        """Begin to seal a file if nothing of it is missing."""
        if lane.is_made(file.name) and self._is_sure(lane, file):
            lane.begin_seal(file.name)
            self._seals.add(Unsealed(lane.number, file.name, file.size_bytes, lane.plan.settles))

    def _settle_made(self, lane: Lane, shard: str) -> None:
        """Begin to settle a source shard if nothing is left to do with it."""
        if not self._open[shard] and (files := lane.to_settle(shard)):
            self._todo.appendleft(SettleTask(lane.number, shard, files))

    def _is_sure(self, lane: Lane, file: OutputFile) -> bool:
        """True if all that a file needs was made of the right bytes."""
        shards = frozenset(lane.doubtful(file.name))
        passed = all(
            not self._supply.may_stream(self._shards[s])
            or (s in self._passed and not self._open[s] and s not in self._suspect)
            for s in shards
        )
        return passed and not self._proofs.are_open(shards, shards)

    def _has_read_right(self, work: Bundle | Task) -> bool:
        """True if all that it read of a streamed shard, and of what that borrows, is known to be right."""
        return work.shard in self._passed and not self._proofs.are_open((work.shard,), work.shards)

    def _believe(self, shard: Shard) -> bool:
        """A streamed shard was right: record what was made of it, but for what waits for the shards that it borrows of.
        False when something went wrong all the same, or may have."""
        error, bundle = self._suspect.get(shard.name, (None, None))
        if error and bundle and self._has_read_right(bundle):
            self._error = self._error or error
            return False
        if names := self._survey.contradicted(shard.name):
            certain = [n for n in names if not self._borrows(shard, n)]
            if certain:
                self._error = self._error or ChecksumMismatch(
                    f"{self._source.label}, shard {shard.name}: {certain[0]} has another largest magnitude than when "
                    "it was read ahead; try another network, and run the same command again"
                )
            return False  # else what it borrows may be at fault: known when that is
        measured = {n: v for n, v in self._survey.measured(shard.name).items() if not self._borrows(shard, n)}
        for lane in self._lanes:  # only now: what was made of wrong bytes must never be found in the journal
            lane.journal_shard(shard.name, measured, self._has_read_right)
        return True

    def _borrows(self, shard: Shard, tensor: str) -> bool:
        """True while what a shard borrows for a tensor is not known to be right."""
        return self._proofs.are_open((shard.name,), {s.name for s in self._shards_of(tensor)})

    def _do_again(self, shard: Shard) -> None:
        """Forget what was made of a shard that came wrong."""
        self._wrong.discard(shard.name)
        self._suspect.pop(shard.name, None)
        bundles = self._bundles[shard.name]
        for bundle in bundles:
            forgotten = [self._lanes[m.lane].forget(m.task.id) for m in bundle.members]
            self._done_bytes -= bundle.source_bytes if any(forgotten) else 0
        self._open[shard.name] = {b.id for b in bundles}
        for name in self._survey.forget(shard.name):
            self._read_ahead(name)
        self._error = self._error or self._supply.again(shard, bundles)

    # --- files and shards --------------------------------------------------------------------------------------------

    def _on_sealed(self, sealed: Sealed) -> None:
        """A file is durable in `part`: settle it, record it, and only then let its sources go."""
        lane = self._lanes[sealed.lane]
        if not lane.is_trusted:
            return  # it is done again, and may need all that it was made of
        lane.seal(sealed)
        for name in lane.files[sealed.file].shards:
            self._free(self._shards[name])
            self._settle_made(lane, name)
        self._tell("file", sealed.file)

    def _on_settled(self, settled: Settled) -> None:
        """What was made of a shard is durable: record it, and only then let go what it was made of."""
        lane = self._lanes[settled.lane]
        if not lane.is_trusted:
            return
        files, reads = lane.settle(settled.shard)
        for name in reads:
            self._free(self._shards[name])
        for name in files:
            self._seal_made(lane, lane.files[name])

    def _on_fetched(self, got: Fetched) -> None:
        """Queue the bundles of a shard; what an earlier run did is only checked."""
        if got.error:
            self._error = self._error or got.error
            return
        if got.sha256:
            self._lanes[0].record_fetched(got.shard.name, got.sha256)
        self._waiting[got.shard.name] = got.shard
        for name, shard in tuple(self._waiting.items()):
            if all(self._supply.is_at_hand(self._shards[s]) for s in self._reads[name]):
                del self._waiting[name]
                self._queue_shard(shard)

    def _queue_shard(self, shard: Shard) -> None:
        """Queue the bundles of a shard, which and whose companions are at hand."""
        bundles, wanted = self._bundles[shard.name], self._wanted.get(shard.name, set())
        self._proofs.drop(shard.name)
        named = self._survey.needed(bundles) | wanted
        at_hand = {n for n in named if all(self._supply.is_at_hand(s) for s in self._shards_of(n))}
        self._todo.extend(self._survey.tasks(at_hand))
        self._queue(bundles)
        self._look(shard)  # a shard of nothing but empty tensors

    def _on_piece(self, piece: "Piece") -> None:
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

    def _queue(self, work: Iterable[Bundle | Streamed]) -> None:
        """Those that need a magnitude wait for it."""
        for each in work:
            bundle = each.work if isinstance(each, Streamed) else each
            if isinstance(bundle, Bundle) and bundle.tensor in self._work.reaches:
                self._survey.wait(each)
            else:
                self._todo.append(each)
        self._todo.extend(self._survey.ready())

    def _shards_of(self, tensor: str) -> Iterable[Shard]:
        return (self._shards[s] for s in self._work.plans[0].weights.shards_of(tensor))

    def _shard_of(self, tensor: str) -> Shard:
        return self._shards[self._work.tensors[tensor].shard]

    def _read_ahead(self, name: str) -> None:
        if self._ahead is None:
            from shardq.ahead import AheadReader

            self._ahead = AheadReader(self._source, self._work.rounds, self._work.goals)
        if self._survey.ask_ahead(name):
            self._ahead.start(self._work.tensors[name])

    def _on_passed(self, passed: "Passed") -> None:
        if passed.error:
            self._error = self._error or passed.error
            return
        (self._passed if passed.sha256 else self._wrong).add(passed.shard.name)
        self._take_passed(passed.digests)
        self._look(passed.shard)

    def _on_lent(self, lent: "Lent") -> None:
        """What a shard borrows is there; or what one lends that is at hand was looked at."""
        self._error = self._error or lent.error
        if lent.reading.keeps:
            self._prove(self._proofs.take_lent(lent.digests))
        else:
            self._take_passed(lent.digests)

    def _take_passed(self, digests: "Mapping[Pair, Digest]") -> None:
        """A shard was right, and so what it lends is known, also to later runs."""
        for lane in self._lanes:
            lane.record_lent(digests)
        self._prove(self._proofs.take_passed(digests))

    def _prove(self, settled: Iterable[str]) -> None:
        """More of what these shards borrow is known to be right; or something was wrong."""
        self._error = self._error or self._proofs.mismatch(self._source.label)
        for name in settled:
            self._look(self._shards[name])

    def _on_uploaded(self, lane: Lane, uploaded: "Uploaded") -> None:
        """A file is in the destination's storage: record that, and only then let it go."""
        if uploaded.error:
            self._error = self._error or uploaded.error
            return
        file = lane.files[uploaded.file.name]
        lane.record_uploaded(file.name)
        if not self._limits.keep_local:
            lane.staging.drop(file.name)
            self._admission.release(self._owners[lane.number, file.name], file.size_bytes)
        self._tell("upload", file.name)

    def _free(self, shard: Shard) -> None:
        """Delete what we fetched, or the user's own shard when that was asked for, once no output needs it."""
        if any(lane.needs(shard.name) for lane in self._lanes):
            return
        if self._supply.free(shard, self._limits.delete_source):
            self._lanes[0].record_freed(shard.name)
        self._admission.free(shard.name)

    def _bring(self, costs: Iterable[ShardCost]) -> None:
        for cost in costs:
            self._supply.begin(self._shards[cost.name], self._bundles[cost.name])

    # --- start -----------------------------------------------------------------------------------------------------

    def _resume(self) -> None:
        """Take up what an earlier run left: free what it could not free any more, upload what it had sealed."""
        for shard in self._shards.values():
            if not any(lane.needs(shard.name) for lane in self._lanes):
                self._free(shard)
        for lane in self._lanes:
            lane.resume_uploads(self._limits.keep_local)
        first = list(iter(self._admission.next, None))
        self._supply.trim(self._admission.staged)  # before anything new comes
        for lane in self._lanes:
            lane.staging.drop_lent()
        for lane in self._lanes[1:]:
            lane.staging.trim_sources(())  # it may have been the first one of an earlier run
        kept = set(self._admission.begun)
        for lane in self._lanes:
            begun = [name for (number, name), owner in self._owners.items() if number == lane.number and owner in kept]
            lane.trim(begun)
            for file in lane.files.values() if lane.plan.settles else ():
                self._seal_made(lane, file)
        self._bring(first)

    def _tell(self, stage: Stage, item: str) -> None:
        ahead_bytes = self._ahead.moved_bytes if self._ahead else 0
        self._report(
            Progress(
                stage=stage,
                item=item,
                done_bytes=self._done_bytes,
                total_bytes=self._total_bytes,
                resumed_bytes=self._resumed_bytes,
                fetched_bytes=self._supply.fetched_bytes + ahead_bytes,
                uploaded_bytes=sum(x.uploader.moved_bytes for x in self._lanes if x.uploader),
                done_files=sum(len(lane.sealed) for lane in self._lanes),
                total_files=sum(len(lane.files) for lane in self._lanes),
            )
        )
