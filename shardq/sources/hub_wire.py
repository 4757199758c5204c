"""HTTP/1.1 answers, read from a socket of our own by the standard library's parser.

huggingface_hub's HTTP client waits for as long as its timeout without a chance to stop, loses what it has buffered when
a connection breaks, and copies every byte three times. Here a wait is cut into slices, bytes go from the socket
straight into the caller's memory, and all that came before a break is kept.
"""

import http.client
import io
import socket
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Final, cast

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

SLICE_S: Final = 0.25  # how long one wait for the socket lasts before the caller is asked whether to go on
_READ_AHEAD_BYTES: Final = 1 << 14  # only for the head of an answer; the body bypasses it
_DRAIN_BYTES: Final = 1 << 16  # a rest of an answer that is read so that its connection can be used again
_HEAD_S: Final = 60.0  # for the head of an answer, however slowly it drips


class WireError(Exception):
    """The connection failed; another one may do better."""


class Patience:
    """How long to wait for a byte, and whom to ask meanwhile whether to wait on: `tick` may raise to stop."""

    def __init__(self, timeout_s: float, tick: Callable[[], None]) -> None:
        self.timeout_s = timeout_s
        self.tick = tick
        self._ticked_at = time.monotonic()

    def tick_when_due(self) -> float:
        """Ask when it is time to. Returns the present moment."""
        now = time.monotonic()
        if now - self._ticked_at >= SLICE_S:
            self._ticked_at = now
            self.tick()
        return now


class _Incoming(io.RawIOBase):
    """The incoming side of a socket whose own timeout is one slice."""

    def __init__(self, sock: socket.socket, patience: Patience) -> None:
        self._sock = sock
        self._patience = patience
        self.head_ends_at = time.monotonic() + max(_HEAD_S, patience.timeout_s)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "WriteableBuffer") -> int:
        since = now = self._patience.tick_when_due()
        while True:
            if now >= self.head_ends_at:
                raise WireError("the head of the answer did not end")
            try:
                return self._sock.recv_into(buffer)
            except TimeoutError:  # of one slice
                now = self._patience.tick_when_due()
            except OSError as error:
                raise WireError(f"{type(error).__name__}: {error}") from error
            if now - since >= self._patience.timeout_s:
                raise WireError(f"no byte came for {self._patience.timeout_s:g} s")


class _Reader(io.BufferedReader):
    """A reader whose `readinto` gives what one look at the socket brings, so that a break loses nothing before it."""

    def readinto(self, buffer: "WriteableBuffer") -> int:
        return self.readinto1(buffer)


class _Wire:
    """What http.client takes for a socket."""

    def __init__(self, reader: _Reader) -> None:
        self._reader = reader

    def makefile(self, _mode: str) -> _Reader:
        """The incoming side."""
        return self._reader


class Answer:
    """Status, headers (names in lower case) and body of the next answer on a socket. Raises WireError."""

    def __init__(self, sock: socket.socket, patience: Patience) -> None:
        incoming = _Incoming(sock, patience)
        self._response = http.client.HTTPResponse(
            cast("socket.socket", _Wire(_Reader(incoming, _READ_AHEAD_BYTES))), method="GET"
        )
        try:
            self._response.begin()
        except http.client.RemoteDisconnected as error:
            raise WireError("the connection was closed before an answer") from error
        except (http.client.HTTPException, ValueError) as error:
            raise WireError(f"the head of the answer is malformed ({type(error).__name__})") from error
        incoming.head_ends_at = float("inf")
        self.status = self._response.status
        self.headers: Mapping[str, str] = {k.lower(): v.strip() for k, v in self._response.headers.items()}

    def read_into(self, out: memoryview) -> int:
        """The next bytes of the body, as many as are there and fit; 0 when it has ended. Raises WireError."""
        if self._response.chunked:
            return self._read_chunk_into(out)
        count = self._response.readinto(out)
        if count == 0 and self._response.length:
            raise WireError(f"the connection was closed {self._response.length} bytes early")
        return count

    def _read_chunk_into(self, out: memoryview) -> int:
        try:
            data = self._response.read1(len(out))
        except (http.client.HTTPException, ValueError) as error:
            raise WireError(f"a chunk of the answer is malformed ({type(error).__name__})") from error
        out[: len(data)] = data
        return len(data)

    def finish(self) -> bool:
        """Read the rest if it is short. True: the connection is fit for another request."""
        rest = memoryview(bytearray(_DRAIN_BYTES))
        try:
            if not self._response.isclosed() and 0 < (self._response.length or 0) <= _DRAIN_BYTES:
                while self.read_into(rest):
                    pass
        except WireError:
            return False
        ended = self._response.isclosed() or self._response.length == 0
        return ended and not self._response.will_close


def exchange(sock: socket.socket, request: str, host: str, headers: Mapping[str, str], patience: Patience) -> Answer:
    """Send a request without a body ("GET /path") and read the head of the answer. Raises WireError, and what the
    patience's tick raises."""
    lines = [f"{request} HTTP/1.1", f"host: {host}", *(f"{key}: {value}" for key, value in headers.items()), "", ""]
    try:
        sock.sendall("\r\n".join(lines).encode("latin-1"))
    except OSError as error:
        raise WireError(f"{type(error).__name__}: {error}") from error
    return Answer(sock, patience)
