"""Moves bytes of one file from the Hub: redirects, byte ranges, retries, and resuming inside one call.

The library's own download gives up on a reset connection, checks no hash and costs twice the CPU time. Here every
answer is checked against the range that was asked for, and the token goes to the Hub's own origin only. huggingface_hub
and its HTTP client are imported inside functions only.
"""

import hashlib
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol
from urllib.parse import urljoin, urlsplit

from shardq.errors import HubTransfer
from shardq.files.atomic import pwrite_all, reading, writing
from shardq.sources.hub_errors import RETRY_STATUSES, RetryPolicy, explain_hub_error, server_wait_s
from shardq.version import VERSION

if TYPE_CHECKING:
    import httpx2

_MAX_HOPS: Final = 8
_CONTENT_RANGE: Final = re.compile(r"bytes (\d+)-(\d+)/(\d+)")
_DEFAULT_PORTS: Final = {"http": 80, "https": 443}


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file of a pinned revision."""

    repo: str
    revision: str
    name: str
    url: str  # on the Hub's origin; where it redirects to changes from call to call
    size_bytes: int


class Sink(Protocol):
    """Takes the bytes of a file in order."""

    def put(self, data: bytes) -> None:
        """The next bytes."""
        ...

    def restart(self) -> bool:
        """Forget everything and begin again; False when that is not possible."""
        ...


class RangeSink:
    """Collects a range in memory; cannot restart, as a server that ignores ranges would send the whole file."""

    def __init__(self) -> None:
        self.data = bytearray()

    def put(self, data: bytes) -> None:
        self.data += data

    def restart(self) -> bool:
        return False


class FileSink:
    """Writes a file from its beginning and hashes it on the way."""

    def __init__(self, fd: int, path: Path, on_bytes: Callable[[int], None]) -> None:
        self.fd = fd
        self.path = path
        self.on_bytes = on_bytes
        self.size_bytes = 0
        self.digest = hashlib.sha256()

    def put(self, data: bytes) -> None:
        with writing(self.path):
            pwrite_all(self.fd, data, self.size_bytes)
        self.digest.update(data)
        self.size_bytes += len(data)
        self.on_bytes(len(data))

    def restart(self) -> bool:
        with writing(self.path):
            os.ftruncate(self.fd, 0)
        self.on_bytes(-self.size_bytes)
        self.size_bytes = 0
        self.digest = hashlib.sha256()
        return True


class _PassingError(Exception):
    """A failure that may not happen again."""

    def __init__(self, reason: str, asked_s: float | None = None) -> None:
        super().__init__(reason)
        self.asked_s = asked_s


class _ExpiredError(_PassingError):
    """A storage address that does not let us in any more: ask the Hub for a new one."""


class _RangeIgnoredError(Exception):
    """The whole file came as an answer to a request for a part of it."""


def origin(url: str) -> tuple[str, str, int]:
    """Scheme, host and port: what a token must not leave."""
    parts = urlsplit(url)
    port = parts.port or _DEFAULT_PORTS.get(parts.scheme, 0)
    return parts.scheme, (parts.hostname or "").lower(), port


class Link:
    """An HTTP client of our own: the library's shared one is closed under all threads when one of them fails."""

    def __init__(self, endpoint: str, retry: RetryPolicy) -> None:
        import httpx2

        self.origin = origin(endpoint)
        self.retry = retry
        self.client = httpx2.Client(timeout=retry.timeout_s, follow_redirects=False)

    def move(self, file: RemoteFile, begin: int, end: int, sink: Sink) -> None:
        """Put the bytes [begin, end) of `file` into `sink`.

        Broken connections go on where they broke. Raises HubAccess, HubTransfer, and what the sink raises.
        """
        import httpx2

        what = f"{file.repo}, file {file.name}"
        position = furthest = begin
        failures = 0
        address = file.url
        while position < end:
            asked_s = None
            try:
                response = self._open(file, address, position, end)
                try:
                    address = str(response.url)
                    for data in response.iter_raw():
                        if position + len(data) > end:
                            raise _PassingError("more bytes came than were asked for")
                        sink.put(data)
                        position += len(data)
                finally:
                    response.close()
                reason = f"the answer ended at byte {position} of {end}"
            except _RangeIgnoredError as error:
                if end != file.size_bytes or not sink.restart():
                    raise HubTransfer(
                        f"{what}: the server ignores ranges and would send all {file.size_bytes} bytes; "
                        "download the repo into a folder and give that"
                    ) from error
                position = 0
                reason = "the server ignores byte ranges"
            except _PassingError as error:
                reason, asked_s = str(error), error.asked_s
                if isinstance(error, _ExpiredError):
                    address = file.url
            except httpx2.TransportError as error:
                reason = f"{type(error).__name__}: {error}"
            if position < end:
                failures = 1 if position > furthest else failures + 1
                furthest = max(furthest, position)
                self.retry.pause(failures, asked_s, what, reason)

    def _open(self, file: RemoteFile, address: str, begin: int, end: int) -> "httpx2.Response":
        """An open answer whose body is exactly the bytes from `begin` on. The caller closes it."""
        whole = begin == 0 and end == file.size_bytes
        for _ in range(_MAX_HOPS):
            headers = self._headers(address)
            if not whole:
                headers["range"] = f"bytes={begin}-{end - 1}"
            request = self.client.build_request("GET", address, headers=headers)
            response = self.client.send(request, stream=True)
            if response.has_redirect_location:
                response.close()
                address = urljoin(address, response.headers["location"])
                continue
            try:
                self._check(response, file, begin, whole)
            except BaseException:
                response.close()
                raise
            return response
        raise _ExpiredError(f"more than {_MAX_HOPS} redirects")

    def _headers(self, address: str) -> dict[str, str]:
        from huggingface_hub import constants, get_token

        # A compressed body has other lengths and offsets than the file.
        headers = {"user-agent": f"shardq/{VERSION}", "accept-encoding": "identity"}
        if origin(address) == self.origin and not constants.HF_HUB_DISABLE_IMPLICIT_TOKEN:
            with reading(constants.HF_TOKEN_PATH):
                token = get_token()
            if token:
                headers["authorization"] = f"Bearer {token}"
        return headers

    def _check(self, response: "httpx2.Response", file: RemoteFile, begin: int, whole: bool) -> None:
        """Is this the part of the file that was asked for?"""
        from huggingface_hub import hf_raise_for_status
        from huggingface_hub.errors import HfHubHTTPError

        status = response.status_code
        if status in RETRY_STATUSES:
            raise _PassingError(f"HTTP {status}", server_wait_s(response.headers))
        if status in {401, 403} and origin(str(response.url)) != self.origin:
            raise _ExpiredError(f"HTTP {status} from storage")
        try:
            hf_raise_for_status(response)
        except HfHubHTTPError as error:
            raise explain_hub_error(error, file.repo, file.revision, f"file {file.name}") from error
        if response.headers.get("content-encoding", "identity") != "identity":
            raise _PassingError("the server compressed a body that must not be")
        if not whole and status == 200:
            raise _RangeIgnoredError
        if status != (200 if whole else 206):
            raise _PassingError(f"unexpected HTTP {status}")
        if whole:
            length = response.headers.get("content-length", str(file.size_bytes))
            if length != str(file.size_bytes):
                raise _PassingError(f"{length} bytes are offered, the listing says {file.size_bytes}")
            return
        found = _CONTENT_RANGE.fullmatch(response.headers.get("content-range", ""))
        if not found or int(found[1]) != begin or int(found[3]) != file.size_bytes:
            raise _PassingError(f"Content-Range {response.headers.get('content-range')!a}, expected from {begin}")
