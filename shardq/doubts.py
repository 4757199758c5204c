"""Which of the bytes that range mode brings are known to be right. Nothing made of others may be kept, and no error
that a task found in others is believed."""

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

from shardq.errors import ChecksumMismatch, ShardqError
from shardq.lane import Lane
from shardq.onepass import OnePass
from shardq.proofs import Proofs, find_proven
from shardq.survey import Survey
from shardq.tasks import Bundle, Task

if TYPE_CHECKING:
    from shardq.loans import Digest, Loan, Pair


class Doubts:
    """What settles them: a shard's hash once all of it has passed, the proofs of what it borrows, and for what was read
    ahead the magnitude that is found in the shard itself."""

    def __init__(self, work: OnePass, label: str, proofs: Proofs, survey: Survey, proven: frozenset[str]) -> None:
        """`label`: of the source; `proven`: shards that an earlier run saw pass and that need not come."""
        self._work, self._label, self._proofs, self._survey = work, label, proofs, survey
        self.proven = proven
        self._passed = set(proven)  # shards whose hash was right
        self._wrong: set[str] = set()  # shards whose hash was wrong, to be done again
        self._suspect: dict[str, tuple[ShardqError, Bundle]] = {}  # by shard: errors that may come of wrong bytes

    # --- what is found out ------------------------------------------------------------------------------------------

    def take_hash(self, shard: str, is_right: bool) -> None:
        """All of a shard has passed."""
        (self._passed if is_right else self._wrong).add(shard)

    def take_passed(self, digests: "Mapping[Pair, Digest]") -> set[str]:
        """What a shard has that was right and lends. Returns the shards of which another loan is known to be right."""
        return self._proofs.take_passed(digests)

    def take_lent(self, digests: "Mapping[Pair, Digest]") -> set[str]:
        """What was lent. Returns as `take_passed`."""
        return self._proofs.take_lent(digests)

    def take_error(self, bundle: Bundle, error: ShardqError) -> None:
        """A bundle has failed that may have read wrong bytes; of each shard the first is kept."""
        self._suspect.setdefault(bundle.shard, (error, bundle))

    def drop_loans(self, shard: str) -> None:
        """A shard borrows nothing after all, as it and its donors are at hand."""
        self._proofs.drop(shard)

    def forget(self, shard: str) -> None:
        """A shard that came wrong comes again."""
        self._wrong.discard(shard)
        self._suspect.pop(shard, None)

    # --- what is known ----------------------------------------------------------------------------------------------

    def is_wrong(self, shard: str) -> bool:
        """True if a shard came wrong and was not forgotten."""
        return shard in self._wrong

    def has_passed(self, shard: str) -> bool:
        """True if a shard's hash was right: it may still borrow what is wrong."""
        return shard in self._passed

    def has_read_right(self, work: Bundle | Task) -> bool:
        """True if all that it read of a streamed shard, and of what that borrows, is known to be right."""
        return work.shard in self._passed and not self._proofs.are_open((work.shard,), work.shards)

    def are_sure(self, shards: Collection[str], streamed: Collection[str]) -> bool:
        """True if all that was made of these shards was made of right bytes; `streamed`: those whose hash is known only
        after their bytes were used."""
        passed = all(s in self._passed and s not in self._suspect for s in streamed)
        return passed and not self._proofs.are_open(shards, shards)

    def mismatch(self) -> ChecksumMismatch | None:
        """The error of a loan that was wrong, if one was."""
        return self._proofs.mismatch(self._label)

    def fault(self, shard: str) -> ShardqError | None:
        """What is wrong all the same with a shard whose hash was right, if that is certain."""
        error, bundle = self._suspect.get(shard, (None, None))
        if error and bundle and self.has_read_right(bundle):
            return error
        certain = (n for n in self._survey.contradicted(shard) if not self._is_borrowing(shard, n))
        if name := next(certain, None):
            return ChecksumMismatch(
                f"{self._label}, shard {shard}: {name} has another largest magnitude than when it was read ahead; try "
                "another network, and run the same command again"
            )
        return None

    def is_contradicted(self, shard: str) -> bool:
        """True while a magnitude found in a shard is not what tasks were given. Where that is no fault yet, what the
        shard borrows may be to blame: known when that is."""
        return bool(self._survey.contradicted(shard))

    def measured(self, shard: str) -> dict[str, float]:
        """Magnitudes that were found in a shard whose hash was right, but for those that a loan may have changed."""
        return {n: v for n, v in self._survey.measured(shard).items() if not self._is_borrowing(shard, n)}

    def _is_borrowing(self, shard: str, tensor: str) -> bool:
        """True while what a shard borrows for a tensor is not known to be right."""
        return self._proofs.are_open((shard,), self._work.shards_of(tensor))


def open_doubts(
    work: OnePass,
    label: str,
    lanes: Sequence[Lane],
    left: Sequence[Bundle],
    loans: "Mapping[str, tuple[Loan, ...]]",
    survey: Survey,
    streams: bool,
) -> Doubts:
    """With what earlier runs saw pass. `left`: bundles to be done; `loans`: what shards borrow for them; `streams`: in
    range mode."""
    known = {pair: sha256 for lane in lanes for pair, sha256 in lane.before.lent.items()}
    proofs = Proofs((loan for own in loans.values() for loan in own), known)
    busy = {b.shard for b in left}
    measured = {s for n in survey.needed(left) if not survey.knows(n) for s in work.shards_of(n)}
    proven = find_proven(lanes, busy, proofs, measured) if streams else frozenset[str]()
    return Doubts(work, label, proofs, survey, proven)
