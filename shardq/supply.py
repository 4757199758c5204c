"""Brings the source bytes of a shard to where tasks can read them: a file that is there, a download, or a stream."""

import logging
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path

from shardq.checkpoint import Shard
from shardq.errors import ChecksumMismatch, SourceUnreadable
from shardq.fetcher import Fetched, Fetcher
from shardq.files.atomic import writing
from shardq.sources.base import Source
from shardq.spans import Span, keep_bundles
from shardq.staging import Staging
from shardq.streamer import Passed, Piece, Streamer, mismatch
from shardq.tasks import Bundle

logger = logging.getLogger(__name__)
STREAMS_PER_SHARD = 2  # that many wrong hashes in a row are an error


class Supply:
    """Source shards of one run. Fetched and streamed ones come on threads; `ready` tells when to call `take`."""

    def __init__(self, source: Source, staging: Staging, slots: int, spans: Mapping[str, tuple[Span, ...]]) -> None:
        """`slots`: pieces of memory for range mode, which brings the `spans` of each shard; 0 stages shards on disk."""
        self._source, self._staging = source, staging
        self._at_hand: deque[Fetched] = deque()
        self._held: dict[int, Piece] = {}  # by bundle
        self._left: dict[int, int] = {}  # bundles by slot, of the piece in it
        self._tries: dict[str, int] = {}  # streams of a shard begun
        self._from_files: set[str] = set()  # shards begun that were at hand
        self._spans = spans
        slot_bytes = max((s.size_bytes for own in spans.values() for s in own), default=0)
        remote = source.remote
        self._streamer = Streamer(source, slots, slot_bytes) if remote and slots else None
        self._fetcher = Fetcher(source, staging.src) if remote and not slots else None

    @property
    def ready(self) -> list[int]:
        """Descriptors that become readable when there is something to take."""
        return [x.ready for x in (self._fetcher, self._streamer) if x]

    @property
    def fetched_bytes(self) -> int:
        """Moved over the network so far."""
        return sum(x.moved_bytes for x in (self._fetcher, self._streamer) if x)

    def is_streamed(self, shard: Shard) -> bool:
        """True if this shard's tasks are only known to have read the right bytes once it has passed."""
        return shard.name in self._tries

    def may_stream(self, shard: Shard) -> bool:
        """`is_streamed`, also before the shard is begun."""
        return self._streamer is not None and shard.name not in self._from_files

    def staged_bytes(self, shard: Shard) -> int:
        """Disk that a shard takes in the staging folder."""
        if self._source.local_path(shard.name):
            return 0
        on_disk = self._streamer is None or (self._staging.src / shard.name).exists()
        return shard.size_bytes if on_disk else 0

    def is_at_hand(self, shard: Shard) -> bool:
        """True if workers can read this shard from a file."""
        return self._file(shard) is not None

    def begin(self, shard: Shard, bundles: Sequence[Bundle]) -> None:
        """Start bringing a shard. Raises SourceUnreadable."""
        if self._file(shard):
            self._from_files.add(shard.name)
            self._at_hand.append(Fetched(shard, None, None))
        elif self._streamer:
            self._tries[shard.name] = self._tries.get(shard.name, 0) + 1
            self._streamer.start(shard, keep_bundles(self._spans[shard.name], bundles))
        elif self._fetcher:
            self._fetcher.start(shard)
        else:
            raise SourceUnreadable(
                f"shard {shard.name} of {self._source.label} is gone since its header was read: put it back and "
                "run the same command again"
            )

    def take(self) -> list[Fetched | Piece | Passed]:
        """What has arrived since the last call."""
        news: list[Fetched | Piece | Passed] = [*self._at_hand]
        self._at_hand.clear()
        for x in (self._fetcher, self._streamer):
            news += x.take() if x else ()
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
            return mismatch(shard, self._source.label, STREAMS_PER_SHARD)
        logger.warning("%s came with a wrong hash: all of it again", shard.name)
        self.begin(shard, bundles)
        return None

    def free(self, shard: Shard, own_too: bool) -> bool:
        """Delete the staged copy of a shard; `own_too`: the user's own file. True if something was deleted."""
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
        """Delete source shards of an earlier run, whole or not, that nobody has counted: others than the `staged`."""
        self._staging.trim_sources(staged)

    def close(self) -> None:
        """Stop downloads and wait for the running ones to notice."""
        for x in (self._fetcher, self._streamer):
            if x:
                x.close()

    def _file(self, shard: Shard) -> Path | None:
        staged = self._staging.src / shard.name
        return self._source.local_path(shard.name) or (staged if staged.exists() else None)
