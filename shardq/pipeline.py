"""Runs one pass: bring source shards, hand bundles to workers, seal finished files, free source shards, upload.

Order of events for an output file: all its tasks -> fsync and hash in `part` -> rename to `ready` -> fsync of the
folder -> journal line, fsync -> only then are its source shards freed -> upload, journal line, fsync -> only then is
the output file freed. A crash loses at most unjournaled tasks.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Final

from shardq.account import Account, open_account
from shardq.admission import ShardCost
from shardq.backlog import Backlog
from shardq.checkpoint import Shard
from shardq.doubts import open_doubts
from shardq.errors import ShardqError
from shardq.executors.base import Executor, Outcome
from shardq.fetcher import Fetched
from shardq.jobs import Jobs, Work
from shardq.lane import Lane, find_left
from shardq.limits import Limits
from shardq.onepass import OnePass
from shardq.plans import OutputFile
from shardq.progress import Report
from shardq.seals import Seals
from shardq.signals import StopFlag
from shardq.sources.base import Source
from shardq.supply import Supply
from shardq.survey import Survey
from shardq.tally import Tally
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
    Unsealed,
)

if TYPE_CHECKING:
    from shardq.ahead import Seen
    from shardq.lender import Lent
    from shardq.loans import Digest, Pair
    from shardq.streamer import Passed, Piece
    from shardq.uploader import Uploaded

POLL_S: Final = 1.0  # longest wait without looking at the stop flag


class Pipeline:
    """One pass over a source for the outputs of a run."""

    def __init__(
        self, work: OnePass, source: Source, lanes: Sequence[Lane], limits: Limits, slots: int, report: Report
    ) -> None:
        """`lanes`: one for each plan of `work`, in order. Fetched shards are staged in the folder of the first."""
        self._work, self._source, self._lanes, self._limits = work, source, lanes, limits
        self._shards: Mapping[str, Shard] = {s.name: s for s in work.checkpoint.shards}
        self._bundles = find_left(work, lanes)
        left = [b for bundles in self._bundles.values() for b in bundles]
        self._open = {name: {b.id for b in bundles} for name, bundles in self._bundles.items()}  # not ended yet
        loans = {n: own for n, own in work.loans.items() if self._bundles[n]} if slots else {}
        survey = Survey(work, {n: value for lane in lanes for n, value in lane.before.amax.items()})
        self._supply = Supply(work, source, lanes[0].staging, slots, loans)
        self._backlog = Backlog(work, self._bundles, survey, self._supply)
        self._doubts = open_doubts(work, source.label, lanes, left, loans, survey, streams=slots > 0)
        self._tally = Tally(work, left, lanes, self._supply, report)
        self._jobs = Jobs(len(work.bundles), [list(lane.files) for lane in lanes])
        self._seals = Seals(source.remote or any(lane.uploader for lane in lanes))
        self._account: Account  # of the disk
        self._error: ShardqError | None = None

    def run(self, executor: Executor, stop: StopFlag) -> None:
        """Do everything that is left. Raises Interrupted, Terminated, or the first error of a task or transfer."""
        self._tally.tell("start", "")
        self._open_account()
        self._resume()
        while not all(lane.is_over for lane in self._lanes) or executor.unfinished():
            if stop.signal or self._error:
                self._drain(executor, stop)
            self._step(executor, stop)

    def close(self) -> None:
        """Stop all transfers; only after the workers, which may read what a transfer has brought."""
        self._supply.close()
        for lane in self._lanes:
            if lane.uploader:
                lane.uploader.close()

    # --- loop ------------------------------------------------------------------------------------------------------

    def _step(self, executor: Executor, stop: StopFlag) -> None:
        """Begin what may begin, wait for something to happen, and take it in."""
        self._bring(iter(self._account.admission.next, None))
        self._take()
        if task := self._seals.take(is_idle=self._backlog.is_empty and not executor.unfinished()):
            self._backlog.put_first(task)
        while not self._backlog.is_empty and executor.room() > 0:
            work = self._backlog.pop()
            self._begin(work)
            executor.submit(self._jobs.job(work))
        also = [stop.ready, *self._supply.ready, *(x.uploader.ready for x in self._lanes if x.uploader)]
        for outcome in executor.wait(POLL_S, also):
            self._collect(outcome)
        self._take()
        if self._supply.ready:
            self._tally.tell("fetch", "")

    def _take(self) -> None:
        """Everything that transfers have brought."""
        for news in self._supply.take():
            if isinstance(news, Fetched):
                self._on_fetched(news)
            else:
                self._on_streamed(news)
        for lane in self._lanes:
            for uploaded in lane.uploader.take() if lane.uploader else ():
                self._on_uploaded(lane, uploaded)

    def _on_streamed(self, news: "Piece | Passed | Lent | Seen") -> None:
        from shardq.lender import Lent  # range mode alone has them
        from shardq.streamer import Passed, Piece

        if isinstance(news, Piece):
            self._backlog.take_piece(news)
        elif isinstance(news, Passed):
            self._on_passed(news)
        elif isinstance(news, Lent):
            self._on_lent(news)
        elif news.error:
            self._error = self._error or news.error
        else:
            self._backlog.take_ahead(news.tensor, news.amax)

    def _drain(self, executor: Executor, stop: StopFlag) -> None:
        """Let running tasks finish, keep what they did, and raise."""
        executor.cancel_queued()
        while executor.unfinished():
            for outcome in executor.wait(POLL_S):
                self._collect(outcome)
        if self._error:
            raise self._error
        folders = ", ".join(str(lane.staging.work) for lane in self._lanes)
        stop.heed(f"{self._tally.percent} % is done and kept in {folders}: run the same command again to resume")

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
        if isinstance(work, Streamed) and isinstance(work.work, Bundle) and not self._doubts.has_read_right(work.work):
            bundle = work.work
            self._doubts.take_error(bundle, error)
            for m in bundle.members:
                self._lanes[m.lane].count_failed(m.task.id)
            self._end(bundle)
        else:
            for number in work.lanes if isinstance(work, SealTask | SettleTask) else ():
                self._lanes[number].distrust()
            self._error = self._error or error

    def _on_surveyed(self, surveyed: Surveyed) -> None:
        """A tensor's magnitude may be complete; that of a verified shard is recorded."""
        amax = self._backlog.take_surveyed(surveyed)
        if amax is not None and not self._supply.is_streamed(self._work.tensors[surveyed.tensor].shard):
            for lane in self._lanes:
                lane.record_amax(surveyed.tensor, amax)

    def _on_done(self, report: BundleDone) -> None:
        bundle = self._work.bundles[report.id]
        streamed = self._supply.is_streamed(bundle.shard)
        for number, done in report.done:
            self._lanes[number].take(done, journal=not streamed)
        self._tally.add(bundle, is_reused=all(done.reused for _, done in report.done))
        self._end(bundle)
        self._tally.tell("work", bundle.shard)

    def _end(self, bundle: Bundle) -> None:
        """A bundle needs its source no more."""
        self._supply.settle(bundle)
        self._open[bundle.shard].discard(bundle.id)
        self._look(self._shards[bundle.shard])

    def _look(self, shard: Shard) -> None:
        """See what a shard's state allows: to believe what was made of it, to do it again, to seal files."""
        if not self._open[shard.name] and self._supply.is_streamed(shard.name):
            if self._doubts.is_wrong(shard.name):
                self._do_again(shard)
                return
            if self._doubts.has_passed(shard.name) and not self._believe(shard):
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
            self._backlog.put_first(SettleTask(lane.number, shard, files))

    def _is_sure(self, lane: Lane, file: OutputFile) -> bool:
        """True if all that a file needs was made of the right bytes."""
        shards = frozenset(lane.doubtful(file.name))
        streamed = {s for s in shards if self._supply.may_stream(s)}
        return not any(self._open[s] for s in streamed) and self._doubts.are_sure(shards, streamed)

    def _believe(self, shard: Shard) -> bool:
        """A streamed shard was right: record what was made of it, but for what waits for the shards that it borrows of.
        False when something went wrong all the same, or may have."""
        if error := self._doubts.fault(shard.name):
            self._error = self._error or error
            return False
        if self._doubts.is_contradicted(shard.name):
            return False
        measured = self._doubts.measured(shard.name)
        for lane in self._lanes:  # only now: what was made of wrong bytes must never be found in the journal
            lane.journal_shard(shard.name, measured, self._doubts.has_read_right)
        return True

    def _do_again(self, shard: Shard) -> None:
        """Forget what was made of a shard that came wrong."""
        self._doubts.forget(shard.name)
        bundles = self._bundles[shard.name]
        for bundle in bundles:
            forgotten = [self._lanes[m.lane].forget(m.task.id) for m in bundle.members]
            if any(forgotten):
                self._tally.take_back(bundle)
        self._open[shard.name] = {b.id for b in bundles}
        self._backlog.forget(shard.name)
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
        self._tally.tell("file", sealed.file)

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
        """A shard is at hand: begin its bundles, and those of shards that waited for it."""
        if got.error:
            self._error = self._error or got.error
            return
        if got.sha256:
            self._lanes[0].record_fetched(got.shard.name, got.sha256)
        for name in self._backlog.take_shard(got.shard.name):
            self._doubts.drop_loans(name)
            self._look(self._shards[name])  # a shard of nothing but empty tensors

    def _on_passed(self, passed: "Passed") -> None:
        if passed.error:
            self._error = self._error or passed.error
            return
        self._doubts.take_hash(passed.shard.name, is_right=bool(passed.sha256))
        self._take_passed(passed.digests)
        self._look(passed.shard)

    def _on_lent(self, lent: "Lent") -> None:
        """What a shard borrows is there; or what one lends that is at hand was looked at."""
        self._error = self._error or lent.error
        if lent.reading.keeps:
            self._prove(self._doubts.take_lent(lent.digests))
        else:
            self._take_passed(lent.digests)

    def _take_passed(self, digests: "Mapping[Pair, Digest]") -> None:
        """A shard was right, and so what it lends is known, also to later runs."""
        for lane in self._lanes:
            lane.record_lent(digests)
        self._prove(self._doubts.take_passed(digests))

    def _prove(self, settled: Iterable[str]) -> None:
        """More of what these shards borrow is known to be right; or something was wrong."""
        self._error = self._error or self._doubts.mismatch()
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
            self._account.release(lane.number, file)
        self._tally.tell("upload", file.name)

    def _free(self, shard: Shard) -> None:
        """Delete what we fetched, or the user's own shard when that was asked for, once no output needs it."""
        if any(lane.needs(shard.name) for lane in self._lanes):
            return
        if self._supply.free(shard, self._limits.delete_source):
            self._lanes[0].record_freed(shard.name)
        self._account.admission.free(shard.name)

    def _bring(self, costs: Iterable[ShardCost]) -> None:
        for cost in costs:
            self._supply.begin(self._shards[cost.name], self._bundles[cost.name])

    # --- start -----------------------------------------------------------------------------------------------------

    def _open_account(self) -> None:
        """Of the disk, with what an earlier run has left there."""
        staged = {name: self._supply.staged_bytes(shard) for name, shard in self._shards.items()}
        idle = {n for n, own in self._bundles.items() if not own and not any(x.needs(n) for x in self._lanes)}
        over = self._doubts.proven | idle
        self._account = open_account(self._work, self._lanes, staged, over, self._limits, self._source.remote)

    def _resume(self) -> None:
        """Take up what an earlier run left: free what it could not free any more, upload what it had sealed."""
        for shard in self._shards.values():
            if not any(lane.needs(shard.name) for lane in self._lanes):
                self._free(shard)
        for lane in self._lanes:
            lane.resume_uploads(self._limits.keep_local)
        first = list(iter(self._account.admission.next, None))
        self._supply.trim(self._account.admission.staged)  # before anything new comes
        for lane in self._lanes:
            lane.staging.drop_lent()
        for lane in self._lanes[1:]:
            lane.staging.trim_sources(())  # it may have been the first one of an earlier run
        for lane in self._lanes:
            lane.trim(self._account.begun_files(lane.number))
            for file in lane.files.values() if lane.plan.settles else ():
                self._seal_made(lane, file)
        self._bring(first)
