"""Connections to the Hub and its storage: host names, proxies, TLS, and idle connections that are used again.

Certificates and proxies are those of the library: its own trust store, and the proxy settings of the environment.
"""

import base64
import os
import select
import socket
import ssl
import string
import threading
import time
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import quote, unquote, urlsplit

from shardq.errors import HubTransfer
from shardq.sources.hub_wire import SLICE_S, Answer, Patience, WireError, exchange

_IDLE_S: Final = 15.0  # servers close idle connections after a while; a request must not meet that moment
_IDLE_CONNECTIONS: Final = 8  # kept for each origin
_DEFAULT_PORTS: Final = {"http": 80, "https": 443}


@dataclass(frozen=True, slots=True)
class Origin:
    """Scheme, host and port: what a connection belongs to, and what a token must not leave."""

    scheme: str
    host: str
    port: int


def origin(url: str) -> Origin:
    """The origin of a URL, in lower case. Raises ValueError when its port is no number."""
    parts = urlsplit(url)
    return Origin(
        parts.scheme.lower(), (parts.hostname or "").lower(), parts.port or _DEFAULT_PORTS.get(parts.scheme, 0)
    )


class Connection:
    """A socket to an origin, directly or through a proxy."""

    def __init__(self, sock: socket.socket, place: Origin, proxy: "_Proxy | None" = None) -> None:
        self._sock = sock
        self.place = place
        self._proxy = proxy  # one that reads the request itself
        self.idle_since: float | None = None

    def ask(self, url: str, headers: Mapping[str, str], patience: Patience) -> Answer:
        """Send a GET and read the head of the answer. Raises WireError, and what the patience's tick raises."""
        parts = urlsplit(url)
        host = parts.netloc.rpartition("@")[2]
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        if self._proxy is not None:
            target = f"{parts.scheme}://{host}{target}"
            headers = {**headers, **self._proxy.headers}
        return exchange(self._sock, f"GET {quote(target, safe=string.punctuation)}", host, headers, patience)

    def alive(self) -> bool:
        """Neither closed by the server nor idle for so long that it may be at any moment."""
        if self.idle_since is None or time.monotonic() - self.idle_since > _IDLE_S:
            return False
        poll = select.poll()
        poll.register(self._sock, select.POLLIN)
        return not poll.poll(0)

    def close(self) -> None:
        """Close the socket."""
        self._sock.close()

    def __del__(self) -> None:
        self._sock.close()  # of an idle one whose source is no longer used


class Pool:
    """Connections of any number of threads: the idle ones by origin, and how to make more."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._idle: dict[Origin, list[Connection]] = {}
        self._context: ssl.SSLContext | None = None

    def connect(self, place: Origin, patience: Patience) -> Connection:
        """An idle connection, else a new one. Raises WireError, HubTransfer, and what the patience's tick raises."""
        while True:
            with self._lock:
                idle = self._idle.get(place)
                connection = idle.pop() if idle else None
            if connection is None:
                return self._open(place, patience)
            if connection.alive():
                return connection

    def put_back(self, connection: Connection, reusable: bool) -> None:
        """Keep a connection for the next request if it is reusable, else close it."""
        if not reusable:
            connection.close()
            return
        connection.idle_since = time.monotonic()
        with self._lock:
            idle = self._idle.setdefault(connection.place, [])
            idle.append(connection)
            del idle[:-_IDLE_CONNECTIONS]

    def _open(self, place: Origin, patience: Patience) -> Connection:
        proxy = _find_proxy(place)
        if proxy is None:
            sock = _dial(place.host, place.port, patience)
            return Connection(self._secure(sock, place, patience), place)
        sock = _dial(proxy.host, proxy.port, patience)
        if place.scheme == "http":
            return Connection(sock, place, proxy)
        target = f"{place.host}:{place.port}"
        answer = exchange(sock, f"CONNECT {target}", target, proxy.headers, patience)
        if answer.status != 200:
            raise WireError(f"the proxy {proxy.host} answers {answer.status}")
        return Connection(self._secure(sock, place, patience), place)

    def _secure(self, sock: socket.socket, place: Origin, patience: Patience) -> socket.socket:
        """The socket itself for http, a TLS one for https. Raises WireError."""
        if place.scheme != "https":
            return sock
        with self._lock:
            if self._context is None:  # it reads all root certificates: once
                import httpx2

                self._context = httpx2.create_ssl_context()
        secure = self._context.wrap_socket(sock, server_hostname=place.host, do_handshake_on_connect=False)
        since = time.monotonic()
        try:
            while not _shake_hands(secure):
                if patience.tick_when_due() - since >= patience.timeout_s:
                    raise WireError(f"no TLS with {place.host} within {patience.timeout_s:g} s")
        except OSError as error:
            secure.close()
            raise WireError(f"no TLS with {place.host}: {error}") from error
        return secure


@dataclass(frozen=True, slots=True)
class _Proxy:
    host: str
    port: int
    headers: Mapping[str, str]


def _find_proxy(place: Origin) -> _Proxy | None:
    """The proxy that the environment names for an origin. Raises HubTransfer for a kind that cannot be used."""
    proxies = urllib.request.getproxies()
    found = proxies.get(place.scheme) or proxies.get("all")
    if not found or urllib.request.proxy_bypass(f"{place.host}:{place.port}"):
        return None
    parts = urlsplit(found if "://" in found else f"http://{found}")
    if parts.scheme != "http" or parts.hostname is None:
        raise HubTransfer(
            f"the proxy for {place.host} is of the kind {parts.scheme!r}, downloads can use http:// proxies only; "
            "set HTTPS_PROXY or NO_PROXY"
        )
    headers = {}
    if parts.username:
        secret = f"{unquote(parts.username)}:{unquote(parts.password or '')}".encode()
        headers["proxy-authorization"] = f"Basic {base64.b64encode(secret).decode()}"
    return _Proxy(parts.hostname, parts.port or _DEFAULT_PORTS["http"], headers)


def _dial(host: str, port: int, patience: Patience) -> socket.socket:
    """A connected socket whose operations wait for one slice. The look-up of the name cannot be stopped."""
    try:
        places = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise WireError(f"cannot find host {host}: {error}") from error
    reason = "it has no address"
    for family, kind, protocol, _, address in places:
        sock = socket.socket(family, kind, protocol)
        try:
            _reach(sock, address, patience)
            sock.settimeout(SLICE_S)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        except OSError as error:
            sock.close()
            reason = error.strerror or str(error)
        except BaseException:
            sock.close()
            raise
        else:
            return sock
    raise WireError(f"cannot connect to {host}: {reason}")


def _reach(sock: socket.socket, address: tuple[Any, ...], patience: Patience) -> None:
    """Connect. Raises OSError, and what the patience's tick raises."""
    sock.setblocking(False)
    since = time.monotonic()
    try:
        sock.connect(address)
    except BlockingIOError:
        poll = select.poll()
        poll.register(sock, select.POLLOUT)
        while not poll.poll(SLICE_S * 1000):
            if patience.tick_when_due() - since >= patience.timeout_s:
                raise TimeoutError(f"no answer within {patience.timeout_s:g} s") from None
        code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            raise OSError(code, os.strerror(code)) from None


def _shake_hands(secure: ssl.SSLSocket) -> bool:
    """True when done, False when one slice was not enough. Raises OSError."""
    try:
        secure.do_handshake()
    except (TimeoutError, ssl.SSLWantReadError):
        return False
    return True
