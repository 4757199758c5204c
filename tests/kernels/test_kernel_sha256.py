"""SHA-256 of streams side by side is hashlib's of each."""

import hashlib
import random

import numpy as np
import pytest

from shardq.kernels import sha256
from shardq.kernels.sha256 import BlockDigest, Digest, new_digest, update_all

LENGTHS = (0, 1, 55, 56, 63, 64, 65, 119, 120, 128, 1000, 4096)


@pytest.fixture(params=["of this CPU", "hashlib"])
def _digests(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "hashlib":
        monkeypatch.setattr(sha256, "new_digest", hashlib.sha256)
    elif not isinstance(new_digest(), BlockDigest):
        pytest.skip("this CPU has no SHA extensions, so that both are hashlib")


def content(seed: int, size_bytes: int) -> bytes:
    return random.Random(seed).randbytes(size_bytes)


@pytest.mark.usefixtures("_digests")
@pytest.mark.parametrize("size_bytes", LENGTHS)
def test_digest_of_one_stream_is_that_of_hashlib(size_bytes: int) -> None:
    digest, data = sha256.new_digest(), content(1, size_bytes)
    digest.update(data)
    assert digest.hexdigest() == hashlib.sha256(data).hexdigest()
    digest.update(b"more")  # reading it changes nothing
    assert digest.hexdigest() == hashlib.sha256(data + b"more").hexdigest()


@pytest.mark.usefixtures("_digests")
@pytest.mark.parametrize("count", [1, 2, 3, 4, 7])
def test_streams_side_by_side_do_not_meet(count: int) -> None:
    """In pieces of any size, which end at different places."""
    rng = random.Random(count)
    digests: list[Digest] = [sha256.new_digest() for _ in range(count)]
    streams = [b""] * count
    for step in range(12):
        pieces = [content(100 * step + i, rng.choice((*LENGTHS, 20_000))) for i in range(count)]
        streams = [a + b for a, b in zip(streams, pieces, strict=True)]
        update_all(digests, [np.frombuffer(p, np.uint8).data if p else p for p in pieces])
    assert [d.hexdigest() for d in digests] == [hashlib.sha256(s).hexdigest() for s in streams]


def test_length_beyond_32_bits_of_bits_is_counted() -> None:
    if not isinstance(digest := new_digest(), BlockDigest):
        pytest.skip("this CPU has no SHA extensions")
    zeros = bytes(1 << 20)
    expected = hashlib.sha256()
    for _ in range(513):
        digest.update(zeros)
        expected.update(zeros)
    assert digest.hexdigest() == expected.hexdigest()


def test_kernel_refuses_what_it_cannot_hash() -> None:
    if not isinstance(new_digest(), BlockDigest):
        pytest.skip("this CPU has no SHA extensions")
    from shardq.kernels._native import hash_blocks

    state = np.zeros(8, np.uint32)
    with pytest.raises(ValueError, match="whole blocks"):
        hash_blocks([state], [bytes(65)])
    with pytest.raises(ValueError, match="equally many"):
        hash_blocks([state, state.copy()], [bytes(64), bytes(128)])
    with pytest.raises(ValueError, match="eight words"):
        hash_blocks([np.zeros(7, np.uint32)], [bytes(64)])
    with pytest.raises(ValueError, match="1 to 3"):
        hash_blocks([state] * 4, [bytes(64)] * 4)
