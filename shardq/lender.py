"""Brings what range mode borrows into files with holes, at the places that it has in its donor, so that nobody has to
look up where a byte went. Not verified: proofs.py compares it with what passes when the donor is streamed."""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from shardq.background import Background
from shardq.errors import ShardqError
from shardq.files.atomic import pwrite_all, writing
from shardq.loans import Digest, Loan, Pair, RangeDigest
from shardq.sources.base import FileReader

OpenFile = Callable[[str, Callable[[int], None]], FileReader]  # as Source.open_file


@dataclass(frozen=True, slots=True)
class Reading:
    """Loans to read."""

    shard: str  # that borrows them; or the donor of all of them, which is at hand, and only their digests are wanted
    loans: tuple[Loan, ...]
    keeps: bool


@dataclass(frozen=True, slots=True)
class Lent:
    """Loans that were read, or the reason why they were not."""

    reading: Reading
    digests: Mapping[Pair, Digest]
    error: ShardqError | None


class Lender(Background[Reading, Lent]):
    """One thread that reads loans in the order in which shards are begun."""

    def __init__(self, open_file: OpenFile, folder: Path, sizes: Mapping[str, int]) -> None:
        """`folder` gets a folder for each shard that borrows, with a file for each donor; `sizes`: bytes of shards."""
        self._open_file, self._folder, self._sizes = open_file, folder, sizes
        super().__init__(
            lambda r: Lent(r, {loan.pair: self._read(loan, r.keeps) for loan in r.loans}, None),
            lambda r, error: Lent(r, {}, error),
            lambda r: f"reading what belongs to {r.shard}",
        )

    def read(self, shard: str, loans: tuple[Loan, ...], keeps: bool) -> None:
        """Queue a Reading."""
        self.start(Reading(shard, loans, keeps))

    def _read(self, loan: Loan, keeps: bool) -> Digest:
        digest, requests = RangeDigest(loan), loan.requests
        room = memoryview(bytearray(max(end - begin for begin, end in requests)))
        target = self._folder / loan.home / loan.donor
        with ExitStack() as held:
            file = held.enter_context(closing(self._open_file(loan.donor, self.count)))
            fd = held.enter_context(_making(target, self._sizes[loan.donor])) if keeps else None
            for begin, end in requests:
                window = room[: end - begin]
                file.read_into(begin, window)
                for at, part in digest.take(begin, window):
                    if fd is not None:
                        with writing(target):
                            pwrite_all(fd, part, at)
        return digest.digest()


@contextmanager
def _making(path: Path, size_bytes: int) -> Iterator[int]:
    """A new file that is all hole: of its final size, as some file systems reserve disk behind the end of others.
    Raises DiskFull, NotWritable."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        try:
            os.ftruncate(fd, size_bytes)
            yield fd
        finally:
            os.close(fd)
