"""Threads that hash their pieces side by side get what each would get alone."""

import hashlib
import random
import threading

import pytest

from shardq import hash_meeting
from shardq.hash_meeting import HashMeeting
from shardq.kernels import sha256

LIMIT_S = 30.0


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
def test_streams_of_threads_that_meet_do_not_mix(threads: int) -> None:
    meeting, found = HashMeeting(), [""] * threads
    streams = [[random.Random(f"{n},{i}").randbytes(random.Random(i).randrange(5000)) for i in range(60)]
               for n in range(threads)]  # fmt: skip

    def hash_stream(number: int) -> None:
        digest = meeting.new_digest()
        with meeting.joined():
            for piece in streams[number]:
                meeting.update(digest, piece)
        found[number] = digest.hexdigest()

    workers = [threading.Thread(target=hash_stream, args=(n,)) for n in range(threads)]
    for w in workers:
        w.start()
    for w in workers:
        w.join(LIMIT_S)
    assert found == [hashlib.sha256(b"".join(s)).hexdigest() for s in streams]


def test_the_second_of_two_threads_hashes_both_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hash_meeting, "WAIT_S", LIMIT_S)
    together: list[int] = []
    update_all = sha256.update_all
    monkeypatch.setattr(sha256, "update_all", lambda d, p: (together.append(len(d)), update_all(d, p)))
    meeting = HashMeeting()
    first, second = meeting.new_digest(), meeting.new_digest()
    with meeting.joined(), meeting.joined():
        waiting = threading.Thread(target=meeting.update, args=(first, b"one"))
        waiting.start()
        while meeting._offer is None:
            pass
        meeting.update(second, b"two")
        waiting.join(LIMIT_S)
    assert together == [2]
    assert (first.hexdigest(), second.hexdigest()) == tuple(hashlib.sha256(x).hexdigest() for x in (b"one", b"two"))


def test_a_thread_that_has_waited_in_vain_does_not_wait_for_the_next_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    meeting, waits = HashMeeting(), 0
    is_left = meeting._is_left

    def count(offer: hash_meeting._Offer) -> bool:
        nonlocal waits
        waits += 1
        return is_left(offer)

    monkeypatch.setattr(meeting, "_is_left", count)
    digest = meeting.new_digest()
    with meeting.joined(), meeting.joined():  # the other one has nothing for now
        for _ in range(hash_meeting.PIECES_ALONE + 1):
            meeting.update(digest, b"piece")
        assert waits == 1
        meeting.update(digest, b"piece")
        assert waits == 2
    assert digest.hexdigest() == hashlib.sha256(b"piece" * (hash_meeting.PIECES_ALONE + 2)).hexdigest()
