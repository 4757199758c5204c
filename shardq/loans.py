"""What range mode borrows: companions (scales, zero points) of codes that come in a piece without them. They are read
by range before the pieces of a shard are worked on. Headers alone decide which bytes."""

import hashlib
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from shardq.files.direct import BLOCK_BYTES
from shardq.spans import Span
from shardq.tasks import TILE_BYTES, Bundle

GAP_BYTES: Final = 1 << 20  # read and thrown away between two ranges: costs less than one more request
WINDOW_BYTES: Final = 8 * TILE_BYTES  # read at once
EXTENTS_PER_BLOCK: Final = 300  # pieces of a file with holes whose places a block of the disk holds; ext4: 340

Pair = tuple[str, str]  # the shard that borrows, and the one that it borrows from; they may be the same


@dataclass(frozen=True, slots=True)
class Range:
    """Consecutive bytes of one tensor."""

    begin: int  # in its shard
    end: int
    tensor: str


@dataclass(frozen=True, slots=True)
class Loan:
    """What all tasks over the codes of one shard need of another one, or of another place in the same."""

    home: str  # the shard that has the codes
    donor: str
    ranges: tuple[Range, ...]  # in order, without overlap

    @property
    def pair(self) -> Pair:
        """Its name."""
        return self.home, self.donor

    @property
    def requests(self) -> tuple[tuple[int, int], ...]:
        """What is asked for, begin and end: ranges with small gaps between them, in windows."""
        joined: list[tuple[int, int]] = []
        for r in self.ranges:
            if joined and r.begin - joined[-1][1] <= GAP_BYTES:
                joined[-1] = joined[-1][0], r.end
            else:
                joined.append((r.begin, r.end))
        return tuple(
            (at, min(end, at + WINDOW_BYTES)) for begin, end in joined for at in range(begin, end, WINDOW_BYTES)
        )

    @property
    def read_bytes(self) -> int:
        """Bytes that are asked for."""
        return sum(end - begin for begin, end in self.requests)

    @property
    def disk_bytes(self) -> int:
        """Disk that the ranges take, in whole blocks, in a file that has nothing else."""
        blocks, last = 0, -1
        for r in self.ranges:
            first, behind = r.begin // BLOCK_BYTES, -(-r.end // BLOCK_BYTES)
            blocks += behind - max(first, last)
            last = behind
        return BLOCK_BYTES * (blocks + 1 + len(self.ranges) // EXTENTS_PER_BLOCK)


@dataclass(frozen=True, slots=True)
class Digest:
    """What tells the content of a loan."""

    sha256: str  # of its ranges, one behind the other
    sums: tuple[int, ...]  # CRC-32 of each, to name the tensor that differs


class RangeDigest:
    """Takes the digest of a loan while bytes of the donor pass by in order."""

    def __init__(self, loan: Loan) -> None:
        self._ranges = loan.ranges
        self._sums: list[int] = []
        self._sum = 0
        self._sha256 = hashlib.sha256()

    def take(self, begin: int, data: memoryview) -> list[tuple[int, memoryview]]:
        """Bytes of the donor from `begin` on; no range may be left out. Returns those that are lent, with their places
        in the donor."""
        end, found = begin + len(data), []
        while len(self._sums) < len(self._ranges) and self._ranges[len(self._sums)].begin < end:
            r = self._ranges[len(self._sums)]
            first = max(r.begin, begin)
            part = data[first - begin : min(r.end, end) - begin]
            self._sha256.update(part)
            self._sum = zlib.crc32(part, self._sum)
            found.append((first, part))
            if r.end > end:
                break
            self._sums.append(self._sum)
            self._sum = 0
        return found

    def digest(self) -> Digest:
        """When all ranges have passed."""
        return Digest(self._sha256.hexdigest(), tuple(self._sums))


def plan_loans(spans: Mapping[str, Sequence[Span]]) -> dict[str, tuple[Loan, ...]]:
    """The loans of each shard that needs any, by its spans; of all of its tasks, so that they are the same whatever an
    interrupted run has left to do."""
    found = {name: _loans(name, own) for name, own in spans.items()}
    return {name: loans for name, loans in found.items() if loans}


def borrowed(bundle: Bundle, span: tuple[int, int]) -> Iterator[tuple[str, Range]]:
    """What a task reads that is not in a piece with its codes, from the first byte of `span` to before the last: the
    donor, and bytes of it."""
    task = next(iter(bundle.rows_tasks), None)
    e = task.encoded if task else None
    if task is None or e is None:
        return
    rows = e.stored_range(task.row, task.end_row)
    for part in e.parts[1:]:
        for begin, end in part.reads(*rows):
            if part.shard != task.shard or begin < span[0] or end > span[1]:
                yield part.shard, Range(begin, end, part.tensor)


def _loans(home: str, spans: Iterable[Span]) -> tuple[Loan, ...]:
    by_donor: dict[str, set[Range]] = {}
    for span in spans:
        for bundle in span.bundles:
            for donor, r in borrowed(bundle, (span.begin, span.end)):
                by_donor.setdefault(donor, set()).add(r)
    return tuple(Loan(home, donor, tuple(_merged(ranges))) for donor, ranges in sorted(by_donor.items()))


def _merged(ranges: Iterable[Range]) -> Iterator[Range]:
    """In order; those of a tensor that touch are one. Empty ones are left out."""
    now: Range | None = None
    for r in sorted((r for r in ranges if r.begin < r.end), key=lambda r: (r.begin, r.end)):
        if now and now.tensor == r.tensor and r.begin <= now.end:
            now = Range(now.begin, max(now.end, r.end), now.tensor)
            continue
        if now:
            yield now
        now = r
    if now:
        yield now
