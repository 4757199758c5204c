"""Moves bytes of one file from the Hub: redirects, byte ranges, retries, and going on where a connection broke.

The library's own download gives up on a reset connection, checks no hash and costs several times the CPU time. Here
every answer is checked against the range that was asked for, and the token goes to the Hub's own origin only.
huggingface_hub is imported inside functions only.
"""

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final
from urllib.parse import urljoin

from shardq.errors import HubTransfer
from shardq.files.atomic import reading
from shardq.hash_meeting import HashMeeting
from shardq.pace import Pace, sleep_ticking
from shardq.sources.hub_dial import Connection, Origin, Pool, origin
from shardq.sources.hub_errors import RETRY_STATUSES, Gate, RetryPolicy, explain_hub_error, server_wait_s
from shardq.sources.hub_sinks import Sink
from shardq.sources.hub_wire import Answer, Patience, WireError
from shardq.version import VERSION

_MAX_HOPS: Final = 8
_MAX_SKIPPED_BYTES: Final = 4 << 20  # read and dropped where a server ignores ranges; more is refused
_CONTENT_RANGE: Final = re.compile(r"bytes (\d+)-(\d+)/(\d+)")
_EXPIRED: Final = frozenset({400, 401, 403, 404, 410})  # from storage: what clouds answer to an old signature
_REDIRECTS: Final = frozenset({301, 302, 303, 307, 308})


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file of a pinned revision."""

    repo: str
    revision: str
    name: str
    url: str  # on the Hub's origin; where it redirects to changes from call to call
    size_bytes: int


class _PassingError(Exception):
    """A failure that may not happen again."""

    def __init__(self, reason: str, asked_s: float | None = None, for_all: bool = False) -> None:
        super().__init__(reason)
        self.asked_s = asked_s
        self.for_all = for_all  # the server counts requests: nobody else should ask either


class _ExpiredError(_PassingError):
    """A storage address that does not let us in any more: ask the Hub for a new one."""


def token_header() -> dict[str, str]:
    """The user's token as the library finds it, for the Hub's own origin only; empty without one."""
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_DISABLE_IMPLICIT_TOKEN:
        return {}
    with reading(constants.HF_TOKEN_PATH):
        token = get_token()
    return {"authorization": f"Bearer {token}"} if token else {}


class Link:
    """What the transfers of one source share: connections, patience, pace, hashes, and the pauses that servers ask for.

    Not the library's HTTP client: that one is closed under all threads when one of them fails to connect.
    """

    def __init__(self, endpoint: str, retry: RetryPolicy, pace: Pace | None = None) -> None:
        self.origin = origin(endpoint)
        self.retry = retry
        self.gate = Gate()
        self.pace = pace or Pace()
        self.pool = Pool()
        self.hashes = HashMeeting()


class Transfer:
    """One file and the storage address that the Hub gave for it; for one thread at a time."""

    def __init__(self, link: Link, file: RemoteFile) -> None:
        self._link = link
        self._file = file
        self._what = f"{file.repo}, file {file.name}"
        self._address = file.url

    def move(self, begin: int, end: int, sink: Sink) -> None:
        """Put the bytes [begin, end) of the file into `sink`, except those that it has already.

        The sink is flushed at least twice a second while something waits, and what it raises ends the transfer. Raises
        HubAccess, HubTransfer.
        """
        retry = self._link.retry
        furthest, failures = begin + sink.size_bytes, 0
        while begin + sink.size_bytes < end:
            resolved = self._address != self._file.url
            try:
                self._pour(begin, end, sink)
                continue
            except _PassingError as error:
                problem = error
            except WireError as error:
                problem = _PassingError(str(error))
            sink.flush()
            position = begin + sink.size_bytes
            failures = 0 if position > furthest else failures + 1
            furthest = max(furthest, position)
            expired = isinstance(problem, _ExpiredError)
            if expired or failures > 1:
                self._address = self._file.url
            wait_s = retry.next_wait_s(failures, problem.asked_s, self._what, str(problem))
            if problem.for_all:
                self._link.gate.hold(wait_s)
            elif not (expired and resolved and failures <= 1):  # an address that grew old is no sign of trouble
                sleep_ticking(wait_s, sink.flush)

    def _pour(self, begin: int, end: int, sink: Sink) -> None:
        """One attempt. Raises WireError, _PassingError."""
        position = begin + sink.size_bytes
        connection, answer = self._open(position, end, sink.flush)
        try:
            if answer.status == 200 and position > 0:
                self._catch_up(answer, begin, end, sink)
            self._drain(answer, begin, end, sink)
            sink.flush()
            reusable = answer.finish()
        except BaseException:
            connection.close()
            raise
        self._link.pool.put_back(connection, reusable)

    def _drain(self, answer: Answer, begin: int, end: int, sink: Sink) -> None:
        retry = self._link.retry
        since, at_first = time.monotonic(), sink.size_bytes
        while (missing := end - begin - sink.size_bytes) > 0:
            count = answer.read_into(sink.space()[:missing])
            if count == 0:
                raise _PassingError(f"the answer ended at byte {begin + sink.size_bytes} of {end}")
            sink.took(count)
            self._link.pace.took(count, sink.flush)
            passed_s = time.monotonic() - since
            if passed_s >= retry.stall_s:
                if sink.size_bytes - at_first < retry.least_rate_bytes_s * passed_s:
                    raise _PassingError(f"less than {retry.least_rate_bytes_s:.0f} bytes/s for {passed_s:.0f} s")
                since, at_first = time.monotonic(), sink.size_bytes

    def _catch_up(self, answer: Answer, begin: int, end: int, sink: Sink) -> None:
        """The server sends the file from its first byte, not from where the sink is."""
        if begin == 0:
            sink.restart()
            return
        missed = begin + sink.size_bytes
        if missed > _MAX_SKIPPED_BYTES:
            raise HubTransfer(
                f"{self._what}: the server ignores byte ranges and would send all {self._file.size_bytes} bytes "
                f"for the {end - missed} from {missed} on; download the repo into a folder and give that"
            )
        scratch = memoryview(bytearray(missed))
        while missed > 0:
            count = answer.read_into(scratch[:missed])
            if count == 0:
                raise _PassingError("the answer ended too early")
            missed -= count

    def _open(self, begin: int, end: int, tick: Callable[[], None]) -> tuple[Connection, Answer]:
        """An answer whose body has the bytes from `begin` on, or with status 200 all bytes of the file."""
        link = self._link
        patience = Patience(link.retry.timeout_s, tick)
        for _ in range(_MAX_HOPS):
            link.gate.wait(tick)
            connection = link.pool.connect(self._place(), patience)
            try:
                answer = connection.ask(self._address, self._headers(begin, end), patience)
                if answer.status not in _REDIRECTS or "location" not in answer.headers:
                    self._check(answer, begin, end)
                    return connection, answer
                reusable = answer.finish()
            except BaseException:
                connection.close()
                raise
            link.pool.put_back(connection, reusable)
            self._address = urljoin(self._address, answer.headers["location"])
        raise _ExpiredError(f"more than {_MAX_HOPS} redirects")

    def _place(self) -> Origin:
        try:
            place = origin(self._address)
        except ValueError:
            place = Origin("", "", 0)
        if place.scheme not in {"http", "https"} or not place.host:
            raise HubTransfer(
                f"{self._what}: the Hub redirects to {self._address!a}, which is no place to download from"
            )
        return place

    def _headers(self, begin: int, end: int) -> dict[str, str]:
        # A compressed body has other lengths and offsets than the file.
        headers = {"user-agent": f"shardq/{VERSION}", "accept": "*/*", "accept-encoding": "identity"}
        if begin > 0 or end < self._file.size_bytes:
            headers["range"] = f"bytes={begin}-{end - 1}"
        return headers | (token_header() if origin(self._address) == self._link.origin else {})

    def _check(self, answer: Answer, begin: int, end: int) -> None:
        """Is this the file, or the part of it that was asked for?"""
        status, size = answer.status, self._file.size_bytes
        if status in RETRY_STATUSES:
            raise _PassingError(f"HTTP {status}", server_wait_s(answer.headers), for_all=status == 429)
        if status in _EXPIRED and origin(self._address) != self._link.origin:
            raise _ExpiredError(f"HTTP {status} from storage")
        self._refuse_errors(answer)
        if answer.headers.get("content-encoding", "identity") != "identity":
            raise _PassingError("the server compressed a body that must not be")
        if status == 200:
            length = answer.headers.get("content-length", str(size))
            if length != str(size):
                raise _PassingError(f"{length} bytes are offered, the listing says {size}")
            return
        found = _CONTENT_RANGE.fullmatch(answer.headers.get("content-range", ""))
        if status != 206 or (begin == 0 and end == size):
            raise _PassingError(f"unexpected HTTP {status}")
        if not found or int(found[1]) != begin or int(found[3]) != size:
            raise _PassingError(f"Content-Range {answer.headers.get('content-range')!a}, expected from {begin}")

    def _refuse_errors(self, answer: Answer) -> None:
        """Raises HubAccess, HubTransfer."""
        import httpx2
        from huggingface_hub import hf_raise_for_status
        from huggingface_hub.errors import HfHubHTTPError

        if answer.status < 400:
            return
        request = httpx2.Request("GET", self._address)
        try:
            hf_raise_for_status(httpx2.Response(answer.status, headers=dict(answer.headers), request=request))
        except HfHubHTTPError as error:
            what = f"file {self._file.name}"
            raise explain_hub_error(error, self._file.repo, self._file.revision, what) from error
