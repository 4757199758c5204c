"""Whether what was lent is what its donor has: known once both have passed by, in whatever order. Nothing made of a
loan may be kept before."""

from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING

from shardq.errors import ChecksumMismatch

if TYPE_CHECKING:
    from shardq.lane import Lane
    from shardq.loans import Digest, Loan, Pair


class Proofs:
    """The loans of one run, by the shard that borrows and the one that lends."""

    def __init__(self, loans: "Iterable[Loan]", known: "Mapping[Pair, str]") -> None:
        """`known`: sha256 of what donors had that passed in an earlier run."""
        self._loans = {loan.pair: loan for loan in loans}
        self._passed = {pair: _digest(sha256) for pair, sha256 in known.items() if pair in self._loans}
        self._lent: dict[Pair, Digest] = {}
        self._open = {home: {d for h, d in self._loans if h == home} for home, _ in self._loans}
        self._wrong: list[Loan] = []

    def has(self, donor: str) -> bool:
        """True if all that this shard lends has passed."""
        return all(pair in self._passed for pair in self._loans if pair[1] == donor)

    def drop(self, home: str) -> None:
        """A shard borrows nothing after all, as it and its donors are at hand."""
        self._open.pop(home, None)

    def take_lent(self, digests: "Mapping[Pair, Digest]") -> set[str]:
        """What was lent. Returns the shards of which another loan is now known to be right."""
        self._lent |= digests
        return self._settle(digests)

    def take_passed(self, digests: "Mapping[Pair, Digest]") -> set[str]:
        """What a donor has whose hash was right. Returns as `take_lent`."""
        self._passed |= digests
        return self._settle(digests)

    def are_open(self, homes: Iterable[str], donors: Collection[str]) -> bool:
        """True while something is not known to be right that one of these shards borrows of one of those."""
        return any(not self._open.get(home, set()).isdisjoint(donors) for home in homes)

    def mismatch(self, label: str) -> ChecksumMismatch | None:
        """The error of a loan that was wrong, if one was; `label`: of the source."""
        if not self._wrong:
            return None
        loan = self._wrong[0]
        lent, passed = self._lent[loan.pair].sums, self._passed[loan.pair].sums
        differ = (r.tensor for r, a, b in zip(loan.ranges, lent, passed, strict=False) if a != b)
        tensor = next(differ, loan.ranges[0].tensor)  # of what an earlier run saw pass only the whole is known
        return ChecksumMismatch(
            f"{label}, shard {loan.donor}: {tensor} came otherwise than when it was read for {loan.home}; try another "
            "network, and run the same command again"
        )

    def _settle(self, pairs: "Iterable[Pair]") -> set[str]:
        homes: set[str] = set()
        for pair in pairs:
            home, donor = pair
            if pair not in self._lent or pair not in self._passed:
                continue
            if self._lent[pair].sha256 != self._passed[pair].sha256:
                self._wrong.append(self._loans[pair])
            elif donor in self._open.get(home, ()):
                self._open[home].discard(donor)
                homes.add(home)
        return homes


def find_proven(
    lanes: "Iterable[Lane]", busy: Collection[str], proofs: Proofs, measured: Collection[str]
) -> frozenset[str]:
    """Shards that unfinished files wait for and that need not come: only what others borrow of them is of use, and that
    was seen to pass by an earlier run. `busy`: those with tasks left; `measured`: those with tensors whose largest
    magnitude has to be found."""
    files = [f for lane in lanes for f in lane.files.values() if f.name not in lane.sealed]
    first = {f.shards[0] for f in files}
    return frozenset(
        s for f in files for s in f.shards if s not in first and s not in busy and s not in measured and proofs.has(s)
    )


def _digest(sha256: str) -> "Digest":
    from shardq.loans import Digest  # range mode alone borrows

    return Digest(sha256, ())
