"""HTTP/1.1 answers, read from a socket of our own.

The library's HTTP client waits for as long as its timeout without a chance to stop, loses what it has buffered when a
connection breaks, and copies every byte three times. Here a wait is cut into slices, bytes go from the socket straight
into the caller's memory, and all that came before a break is kept.
"""

import http.client
import io
import re
import socket
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

SLICE_S: Final = 0.25  # how long one wait for the socket lasts before the caller is asked whether to go on
_LINE_BYTES: Final = 1 << 16
_READ_AHEAD_BYTES: Final = 1 << 14  # only for the head of an answer; the body bypasses it
_DRAIN_BYTES: Final = 1 << 16  # a rest of an answer that is read so that its connection can be used again
_HEAD_S: Final = 60.0  # for the head of an answer, however slowly it drips
_STATUS: Final = re.compile(rb"HTTP/1\.([01]) ([1-9]\d\d)(?: [^\r\n]*)?\r?\n")


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


class Answer:
    """Status, headers (names in lower case) and body of the next answer on a socket. Raises WireError."""

    def __init__(self, sock: socket.socket, patience: Patience) -> None:
        self._incoming = _Incoming(sock, patience)
        self._reader = io.BufferedReader(self._incoming, _READ_AHEAD_BYTES)
        self.status = 100
        self.headers: Mapping[str, str] = {}
        while self.status < 200:  # interim answers come before the real one
            self._read_head()
        self._incoming.head_ends_at = float("inf")

    def _read_head(self) -> None:
        line = self._reader.readline(_LINE_BYTES)
        match = _STATUS.fullmatch(line)
        if match is None:
            raise WireError("the answer is not HTTP/1" if line else "the connection was closed before an answer")
        try:
            message = http.client.parse_headers(self._reader)
        except http.client.HTTPException as error:
            raise WireError(f"the head of the answer is malformed ({type(error).__name__})") from error
        self.status = int(match[2])
        self.headers = {key.lower(): value.strip() for key, value in message.items()}
        empty = self.status < 200 or self.status in {204, 304}
        length = self.headers.get("content-length", "")
        self._chunked = not empty and "chunked" in self.headers.get("transfer-encoding", "").lower()
        # of the body or of the chunk; None: until the connection closes
        self._left = 0 if empty or self._chunked else int(length) if length.isdecimal() else None
        self._ended = self._left == 0 and not self._chunked
        self._keeps = match[1] == b"1" and "close" not in self.headers.get("connection", "").lower()

    def read_into(self, out: memoryview) -> int:
        """The next bytes of the body, as many as are there and fit; 0 when it has ended. Raises WireError."""
        if self._chunked and self._left == 0 and not self._ended:
            self._begin_chunk()
        if self._ended:
            return 0
        if self._left is None:
            count = self._reader.readinto1(out)
            self._ended, self._keeps = count == 0, False
            return count
        count = self._reader.readinto1(out[: self._left])
        if count == 0:
            raise WireError(f"the connection was closed {self._left} bytes early")
        self._left -= count
        self._ended = self._left == 0 and not self._chunked
        return count

    def _begin_chunk(self) -> None:
        line = self._reader.readline(_LINE_BYTES).strip() or self._reader.readline(_LINE_BYTES).strip()
        try:
            self._left = int(line.partition(b";")[0], 16)
        except ValueError as error:
            raise WireError("a chunk of the answer is malformed") from error
        if self._left == 0:
            self._ended, self._keeps = True, False  # trailers may follow; not worth the parsing

    def finish(self) -> bool:
        """Read the rest if it is short. True: the connection is fit for another request."""
        rest = memoryview(bytearray(_DRAIN_BYTES))
        try:
            if self._left is not None and self._left <= _DRAIN_BYTES and not self._chunked:
                while self.read_into(rest):
                    pass
        except WireError:
            return False
        return self._keeps and self._ended


def exchange(sock: socket.socket, request: str, host: str, headers: Mapping[str, str], patience: Patience) -> Answer:
    """Send a request without a body ("GET /path") and read the head of the answer. Raises WireError, and what the
    patience's tick raises."""
    lines = [f"{request} HTTP/1.1", f"host: {host}", *(f"{key}: {value}" for key, value in headers.items()), "", ""]
    try:
        sock.sendall("\r\n".join(lines).encode("latin-1"))
    except OSError as error:
        raise WireError(f"{type(error).__name__}: {error}") from error
    return Answer(sock, patience)
