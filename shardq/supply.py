"""Brings the source bytes of a shard to where tasks can read them: a file that is there, a download, or a stream."""

import logging
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from shardq.checkpoint import Shard
from shardq.errors import ChecksumMismatch, SourceUnreadable
from shardq.fetcher import Fetched, Fetcher
from shardq.files.atomic import writing
from shardq.onepass import OnePass
from shardq.sources.base import FileReader, Source
from shardq.sources.local import open_local
from shardq.spans import cut_all, keep_bundles
from shardq.staging import Staging
from shardq.tasks import Bundle

if TYPE_CHECKING:
    from shardq.ahead import AheadReader, Seen
    from shardq.lender import Lender, Lent
    from shardq.loans import Loan
    from shardq.streamer import Passed, Piece, Streamer

logger = logging.getLogger(__name__)
STREAMS_PER_SHARD = 2  # that many wrong hashes in a row are an error
News: TypeAlias = "Fetched | Piece | Passed | Lent | Seen"


class Supply:
    """Source shards of one run. Fetched and streamed ones come on threads; `ready` tells when to call `take`."""

    def __init__(
        self,
        work: OnePass,
        source: Source,
        staging: Staging,
        slots: int,
        loans: "Mapping[str, tuple[Loan, ...]]",
    ) -> None:
        """`slots`: pieces of memory for range mode, which brings the spans of each shard, and before them the `loans`
        of those that borrow; 0 stages shards on disk."""
        self._work, self._source, self._staging = work, source, staging
        self._at_hand: deque[Fetched] = deque()
        self._held: dict[int, Piece] = {}  # by bundle
        self._left: dict[int, int] = {}  # bundles by slot, of the piece in it
        self._tries: dict[str, int] = {}  # streams of a shard begun
        self._from_files: set[str] = set()  # shards begun that were at hand
        self._spans = cut_all(work) if slots else {}
        self._loans = loans
        self._waiting: dict[str, list[Piece]] = {}  # pieces of shards whose loans are on their way
        slot_bytes = max((s.size_bytes for own in self._spans.values() for s in own), default=0)
        streams: tuple[Streamer | None, Lender | None] = (None, None)
        if source.remote and slots:
            streams = self._make_streams(slots, slot_bytes)
        self._streamer, self._lender = streams
        self._ahead: AheadReader | None = None
        self._fetcher = Fetcher(source, staging.src) if source.remote and not slots else None

    @property
    def ready(self) -> list[int]:
        """Descriptors that become readable when there is something to take."""
        return [x.ready for x in self._transfers]

    @property
    def fetched_bytes(self) -> int:
        """Moved over the network so far."""
        return sum(x.moved_bytes for x in self._transfers)

    def is_streamed(self, shard: str) -> bool:
        """True if this shard's tasks are only known to have read the right bytes once it has passed."""
        return shard in self._tries

    def may_stream(self, shard: str) -> bool:
        """`is_streamed`, also before the shard is begun."""
        return self._streamer is not None and shard not in self._from_files

    def staged_bytes(self, shard: Shard) -> int:
        """Disk that a shard and what it borrows take in the staging folder."""
        loans = () if self._streamer is None else self._loans.get(shard.name, ())
        lent = sum(loan.disk_bytes for loan in loans)
        if self._source.local_path(shard.name):
            return 0 if all(self._source.local_path(loan.donor) for loan in loans) else lent
        on_disk = self._streamer is None or (self._staging.src / shard.name).exists()
        return lent + (shard.size_bytes if on_disk else 0)

    def is_at_hand(self, shard: str) -> bool:
        """True if workers can read this shard from a file."""
        return self._file(shard) is not None

    def begin(self, shard: Shard, bundles: Sequence[Bundle]) -> None:
        """Start bringing a shard. One that is at hand is streamed all the same if what it borrows is not, as workers
        look for loans beside pieces only. Raises SourceUnreadable."""
        loans, lends = self._loans.get(shard.name, ()), self._lent_by(shard.name)
        if self._file(shard.name) and (self._streamer is None or all(self._file(loan.donor) for loan in loans)):
            self._from_files.add(shard.name)
            self._at_hand.append(Fetched(shard, None, None))
            if self._lender and lends:
                self._lender.read(shard.name, lends, keeps=False)
        elif self._streamer:
            if self._lender and loans and shard.name not in self._tries:
                self._waiting[shard.name] = []
                self._lender.read(shard.name, loans, keeps=True)
            self._tries[shard.name] = self._tries.get(shard.name, 0) + 1
            self._streamer.start(shard, keep_bundles(self._spans[shard.name], bundles), lends)
        elif self._fetcher:
            self._fetcher.start(shard)
        else:
            raise SourceUnreadable(
                f"shard {shard.name} of {self._source.label} is gone since its header was read: put it back and "
                "run the same command again"
            )

    def read_ahead(self, tensor: str) -> None:
        """Begin to read a tensor for its largest magnitude alone, before its shard comes."""
        if self._ahead is None:
            from shardq.ahead import AheadReader

            self._ahead = AheadReader(self._source, self._work.rounds, self._work.goals)
        self._ahead.start(self._work.tensors[tensor])

    def take(self) -> list[News]:
        """What has arrived since the last call; the pieces of a shard only behind its loans."""
        arrived: list[News] = [*self._at_hand]
        self._at_hand.clear()
        for x in self._transfers:
            arrived += x.take()
        return arrived if self._streamer is None else self._in_order(arrived)

    def _in_order(self, arrived: list[News]) -> list[News]:
        from shardq.lender import Lent
        from shardq.streamer import Piece

        news: list[News] = []
        for each in arrived:
            if isinstance(each, Piece) and each.span.shard in self._waiting:
                self._waiting[each.span.shard].append(each)
                continue
            news.append(each)
            if isinstance(each, Lent) and each.reading.keeps and not each.error:
                news += self._waiting.pop(each.reading.shard)
        for piece in news:
            if isinstance(piece, Piece):
                self._left[piece.slot.fd] = len(piece.span.bundles)
                self._held |= {b.id: piece for b in piece.span.bundles}
        return news

    def settle(self, bundle: Bundle) -> None:
        """A bundle needs its source no more."""
        piece = self._held.pop(bundle.id, None)
        if piece is None or self._streamer is None:
            return
        self._left[piece.slot.fd] -= 1
        if self._left[piece.slot.fd] == 0:
            self._streamer.give_back(piece.slot)

    def again(self, shard: Shard, bundles: Sequence[Bundle]) -> ChecksumMismatch | None:
        """Stream a shard once more that came wrong; the error when that was tried before."""
        if self._tries[shard.name] >= STREAMS_PER_SHARD:
            from shardq.streamer import mismatch

            return mismatch(shard, self._source.label, STREAMS_PER_SHARD)
        logger.warning("%s came with a wrong hash: all of it again", shard.name)
        self.begin(shard, bundles)
        return None

    def free(self, shard: Shard, own_too: bool) -> bool:
        """Delete the staged copy of a shard; `own_too`: the user's own file. True if something was deleted."""
        self._staging.drop_lent(shard.name)
        staged, own = self._staging.src / shard.name, self._source.local_path(shard.name)
        with writing(own or staged):
            if staged.exists():
                staged.unlink()
                return True
            if own_too and own and self._source.commit is None:  # a folder, never the Hub's cache
                own.unlink()
                logger.info("deleted source shard %s", own)
                return True
        return False

    def trim(self, staged: Sequence[str]) -> None:
        """Delete source shards of an earlier run, whole or not, that nobody has counted: others than the `staged`. In
        range mode some of these are there for their loans alone."""
        here = (self._staging.src / name for name in staged)
        self._staging.trim_sources([n for n, p in zip(staged, here, strict=True) if not self._streamer or p.exists()])

    def close(self) -> None:
        """Stop downloads and wait for the running ones to notice."""
        for x in self._transfers:
            x.close()

    def _make_streams(self, slots: int, slot_bytes: int) -> "tuple[Streamer, Lender | None]":
        from shardq.lender import Lender  # range mode alone needs them
        from shardq.streamer import Streamer

        sizes = {s.name: s.size_bytes for s in self._work.checkpoint.shards}
        lender = Lender(self._open, self._staging.lent, sizes) if self._loans else None
        return Streamer(self._open, slots, slot_bytes), lender

    @property
    def _transfers(self) -> "list[Fetcher | Lender | Streamer | AheadReader]":
        return [x for x in (self._fetcher, self._lender, self._streamer, self._ahead) if x]

    def _lent_by(self, donor: str) -> "tuple[Loan, ...]":
        return tuple(loan for loans in self._loans.values() for loan in loans if loan.donor == donor)

    def _file(self, name: str) -> Path | None:
        staged = self._staging.src / name
        return self._source.local_path(name) or (staged if staged.exists() else None)

    def _open(self, name: str, on_bytes: Callable[[int], None]) -> FileReader:
        """As the source does; a shard that was staged is read there."""
        staged = self._staging.src / name
        return open_local(staged, on_bytes) if staged.exists() else self._source.open_file(name, on_bytes)


def source_paths(work: OnePass, source: Source, staging: Staging) -> dict[str, str]:
    """Where workers find each source shard."""
    paths: dict[str, str] = {}
    for shard in work.checkpoint.shards:
        own = source.local_path(shard.name)
        paths[shard.name] = str(own) if own else str(staging.src / shard.name)
    return paths
