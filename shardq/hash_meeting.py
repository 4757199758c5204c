"""SHA-256 of streams that several threads bring at the same time: threads that meet hash their pieces side by side."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from shardq.kernels.sha256 import Buffer, Digest

WAIT_S: Final = 0.02  # for another thread; a fast link brings a piece in less
PIECES_ALONE: Final = 16  # hashed without waiting after one has waited in vain, as where links are slow


class HashMeeting:
    """Of the streams of one source, each of which is one thread's."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._offer: _Offer | None = None  # of a thread that waits
        self._streams = 0
        self._alone = 0  # pieces to hash before anyone waits again

    @contextmanager
    def joined(self) -> Iterator[None]:
        """A stream is under way."""
        with self._lock:
            self._streams += 1
        try:
            yield
        finally:
            with self._lock:
                self._streams -= 1

    def new_digest(self) -> "Digest":
        """For a stream of which nothing has come yet."""
        from shardq.kernels.sha256 import new_digest

        return new_digest()

    def update(self, digest: "Digest", data: "Buffer") -> None:
        """`digest.update(data)`, in this thread or in one that comes meanwhile."""
        from shardq.kernels.sha256 import update_all

        offer = None
        with self._lock:
            other, self._offer = self._offer, None
            if other is None and self._streams > 1:
                if self._alone:
                    self._alone -= 1
                else:
                    offer = self._offer = _Offer(digest, data)
        if other:
            try:
                update_all([digest, other.digest], [data, other.data])
            finally:
                other.done.set()
        elif offer is None or self._is_left(offer):
            digest.update(data)

    def _is_left(self, offer: "_Offer") -> bool:
        """Wait a moment. True if nobody has taken the piece, and nobody will."""
        if offer.done.wait(WAIT_S):
            return False
        with self._lock:
            if self._offer is offer:
                self._offer, self._alone = None, PIECES_ALONE
                return True
        offer.done.wait()
        return False


class _Offer:
    """A piece that another thread may hash beside its own."""

    def __init__(self, digest: "Digest", data: "Buffer") -> None:
        self.digest, self.data = digest, data
        self.done = threading.Event()
