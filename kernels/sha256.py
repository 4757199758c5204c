"""SHA-256 (FIPS 180-4) of several streams side by side.

A processor with instructions for it spends most of a hash waiting for the round before; in that time it can do rounds
of other streams. Three at once take 0.57 of the time that they take one after the other, two 0.68 (AMD Zen 5).
Elsewhere this is hashlib.
"""

import hashlib
from collections.abc import Sequence
from typing import Final, Protocol

import numpy as np

Buffer = bytes | bytearray | memoryview  # of an array its `data`
TOGETHER: Final = 3  # streams that share a processor well
BLOCK_BYTES: Final = 64
LENGTH_BYTES: Final = 8
START: Final = (  # fractional parts of the square roots of the first eight primes (FIPS 180-4, 5.3.3)
    0x6A09E667, 0xBB67AE85, 0x3C6EF372, 0xA54FF53A, 0x510E527F, 0x9B05688C, 0x1F83D9AB, 0x5BE0CD19,
)  # fmt: skip


class Digest(Protocol):
    """One stream."""

    def update(self, data: Buffer, /) -> None:
        """Take the next bytes, C-contiguous."""

    def hexdigest(self) -> str:
        """Of all bytes so far; more may come."""


class BlockDigest:
    """A stream whose state is ours, so that others can be hashed beside it."""

    def __init__(self) -> None:
        self._state = np.array(START, np.uint32)
        self._rest = b""  # less than a block
        self._count_bytes = 0

    def update(self, data: Buffer) -> None:
        """See Digest."""
        _hash([self], [self._take(data)])

    def hexdigest(self) -> str:
        """See Digest."""
        end = BlockDigest()
        end._state[:] = self._state
        padding = b"\x80" + bytes(-(len(self._rest) + 1 + LENGTH_BYTES) % BLOCK_BYTES)
        end.update(self._rest + padding + (8 * self._count_bytes).to_bytes(LENGTH_BYTES, "big"))
        return end._state.astype(">u4").tobytes().hex()

    def _take(self, data: Buffer) -> memoryview:
        """Whole blocks that are still to be hashed, in place; what a block lacks or leaves is kept or completed."""
        view = memoryview(data).cast("B")
        self._count_bytes += len(view)
        if self._rest:
            lacking = BLOCK_BYTES - len(self._rest)
            self._rest += view[:lacking]
            view = view[lacking:]
            if len(self._rest) < BLOCK_BYTES:
                return view
            block, self._rest = self._rest, b""
            _hash([self], [memoryview(block)])
        whole = len(view) // BLOCK_BYTES * BLOCK_BYTES
        self._rest = bytes(view[whole:])
        return view[:whole]


def new_digest() -> Digest:
    """A stream of which nothing has come yet."""
    try:
        from shardq.kernels._native import hash_blocks
    except ImportError:  # this processor has no instructions for it
        return hashlib.sha256()
    del hash_blocks
    return BlockDigest()


def update_all(digests: Sequence[Digest], data: Sequence[Buffer]) -> None:
    """The next bytes of some streams at once; best of up to TOGETHER streams and equally many bytes of each."""
    ours = [d for d in digests if isinstance(d, BlockDigest)]
    if len(ours) < len(digests):
        for digest, part in zip(digests, data, strict=True):
            digest.update(part)
        return
    parts = [d._take(part) for d, part in zip(ours, data, strict=True)]
    for at in range(0, len(ours), TOGETHER):
        _hash(ours[at : at + TOGETHER], parts[at : at + TOGETHER])


def _hash(digests: Sequence[BlockDigest], parts: Sequence[memoryview]) -> None:
    """Whole blocks of up to TOGETHER streams: those that all have at once, and so on with those that have more."""
    from shardq.kernels._native import hash_blocks

    left = [(d, p) for d, p in zip(digests, parts, strict=True) if len(p)]
    while left:
        common = min(len(p) for _, p in left)
        hash_blocks([d._state for d, _ in left], [p[:common] for _, p in left])
        left = [(d, p[common:]) for d, p in left if len(p) > common]
