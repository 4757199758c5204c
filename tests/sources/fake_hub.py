"""A Hub on loopback: what the real client needs to list, read and download a model repo, with scripted faults.

Two ports are two origins, the Hub and its storage, so that a token which crosses over is seen.
"""

import hashlib
import json
import re
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar, Final, Literal, TypeVar
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_test_token"
PAGE = 4  # entries of a tree listing per page
STEP_BYTES = 1 << 20  # sent at a time
TRICKLE_S = 0.02
FaultT = TypeVar("FaultT", bound=Any)  # Fault, or what else has `times` and `skip`


@dataclass
class Seen:
    """One request that arrived."""

    origin: Literal["hub", "storage"]
    method: str
    path: str
    range: str | None
    authorization: str | None
    sent_bytes: int | None = None  # of the body, once the answer has ended
    status: int | None = None
    at_s: float = 0.0  # time.monotonic()

    @property
    def begin(self) -> int:
        """The first byte that was asked for."""
        return int(self.range.removeprefix("bytes=").partition("-")[0]) if self.range else 0


@dataclass
class Fault:
    """What to do wrong, with which requests, how often.

    status: answer with it and `headers`. reset_now, hang: before the head of the answer. drop (reset), truncate (clean
    close), stall (for `for_s`), trickle (at `rate_bytes_s`): after `at` bytes of the body. corrupt: the byte at `at`.
    ignore_range, wrong_range: send something else. expire: the signed address is void from now on.
    """

    kind: Literal[
        "status",
        "reset_now",
        "hang",
        "drop",
        "truncate",
        "stall",
        "trickle",
        "corrupt",
        "ignore_range",
        "wrong_range",
        "expire",
        "drop_put",
        "lose_reply",
        "reject_hash",
    ]
    path: str  # regular expression, searched in the path
    times: int = 1
    status: int = 503
    headers: Mapping[str, str] = field(default_factory=dict)
    at: int = 0
    skip: int = 0  # let this many matching requests pass first
    for_s: float = 60.0
    rate_bytes_s: float = 100.0
    method: str = ""  # regular expression


@dataclass
class Repo:
    """A model repo: whole trees by commit, and names for commits."""

    commits: dict[str, Mapping[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    made_at_s: dict[str, float] = field(default_factory=dict)  # by commit
    access: Literal["public", "private", "gated"] = "public"
    xet_hashes: dict[str, str] = field(default_factory=dict)  # by path: what is in Xet storage
    _hashes: dict[int, tuple[bytes, str]] = field(default_factory=dict)

    def commit(self, files: Mapping[str, bytes], ref: str = "main") -> str:
        sha = hashlib.sha1(repr((len(self.commits), sorted(files))).encode()).hexdigest()
        self.commits[sha] = dict(files)
        self.refs[ref] = sha
        self.made_at_s[sha] = time.time()
        return sha

    def sha256(self, data: bytes) -> str:
        """Computed once for each object."""
        found = self._hashes.get(id(data))
        if found is None:
            found = self._hashes[id(data)] = (data, hashlib.sha256(data).hexdigest())
        return found[1]

    def find(self, sha256: str) -> bytes | None:
        """The content of a file with this hash."""
        files = (data for tree in list(self.commits.values()) for data in tree.values())
        return next((data for data in files if self.sha256(data) == sha256), None)


def is_large(path: str) -> bool:
    return path.endswith((".safetensors", ".gguf", "tokenizer.json"))


POLL_S: Final = 0.02
LEAVING_S: Final = 30.0


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, *args: Any) -> None:
        self.open = 0  # connections
        self._counting = threading.Lock()
        super().__init__(*args)

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._counting:
            self.open += 1
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            with self._counting:
                self.open -= 1

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # clients hang up as they please
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    hub: ClassVar["FakeHub"]
    origin: ClassVar[Literal["hub", "storage"]]
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    seen: Seen

    def log_message(self, template: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path, fault = self.arrive()
        if fault is not None and fault.kind == "status":
            self.answer(fault.status, b"", dict(fault.headers))
        else:
            self.route(path, fault)

    def do_POST(self) -> None:
        path, fault = self.arrive()
        self.route_write(path, fault)

    do_PUT = do_DELETE = do_POST

    def arrive(self) -> tuple[str, Fault | None]:
        """Log a request. Resets, hangs and expiries happen here."""
        path = unquote(self.path)
        authorization = self.headers.get("authorization")
        now = time.monotonic()
        self.seen = Seen(self.origin, self.command, path, self.headers.get("range"), authorization, at_s=now)
        with self.hub.lock:
            self.hub.log.append(self.seen)
        fault = self.hub.take_fault(path, self.command)
        if fault is not None and fault.kind == "reset_now":
            self.reset()
            raise ConnectionAbortedError
        if fault is not None and fault.kind == "hang":
            self.hub.closing.wait(fault.for_s)
        return path, fault

    def reset(self) -> None:
        """The connection is reset, not closed, when this request has been dealt with."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.shutdown(socket.SHUT_RD)
        self.close_connection = True

    def route(self, path: str, fault: Fault | None) -> None:
        raise NotImplementedError

    def route_write(self, path: str, fault: Fault | None) -> None:
        """POST, PUT and DELETE; here there is nothing to be written."""
        del path, fault
        self.close_connection = True  # the body stays unread
        self.answer(405, b"", {})

    def answer(
        self, status: int, body: bytes | memoryview, headers: Mapping[str, str], fault: Fault | None = None
    ) -> None:
        self.seen.status = status
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.seen.sent_bytes = 0
        if self.command == "HEAD":
            return
        view = memoryview(body)
        if fault is None or fault.kind not in {"drop", "truncate", "stall", "trickle"}:
            self.send_body(view)
            return
        self.send_body(view[: fault.at])
        if fault.kind == "drop":
            self.wfile.flush()
            time.sleep(TRICKLE_S)  # what was sent arrives before the reset
            self.reset()
        elif fault.kind == "truncate":
            self.close_connection = True
        elif fault.kind == "stall":
            self.hub.closing.wait(fault.for_s)
            self.send_body(view[fault.at :])
        else:
            step = max(1, int(fault.rate_bytes_s * TRICKLE_S))
            for at in range(fault.at, len(view), step):
                if self.hub.closing.wait(TRICKLE_S):
                    return
                self.send_body(view[at : at + step])

    def send_body(self, view: memoryview) -> None:
        for at in range(0, len(view), STEP_BYTES):
            piece = view[at : at + STEP_BYTES]
            assert self.seen.sent_bytes is not None
            self.seen.sent_bytes += len(piece)  # before the write: who has the last byte may look at once
            try:
                self.wfile.write(piece)
            except OSError:
                self.seen.sent_bytes -= len(piece)
                raise

    def answer_json(self, value: object, headers: Mapping[str, str]) -> None:
        self.answer(200, json.dumps(value).encode(), {"Content-Type": "application/json", **headers})

    def refuse(self, status: int, code: str) -> None:
        self.answer(status, b"", {"X-Error-Code": code, "X-Error-Message": code})

    def answer_file(self, data: bytes, headers: Mapping[str, str], fault: Fault | None) -> None:
        kind = fault.kind if fault is not None else None
        if fault is not None and kind == "corrupt":
            data = data[: fault.at] + bytes([data[fault.at] ^ 1]) + data[fault.at + 1 :]
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("range") or "")
        if match is None or kind == "ignore_range":
            self.answer(200, data, headers, fault)
            return
        begin, end = int(match[1]), min(int(match[2] or len(data) - 1) + 1, len(data))
        if begin >= len(data):
            self.answer(416, b"", {"Content-Range": f"bytes */{len(data)}"})
            return
        content_range = f"bytes {begin + (kind == 'wrong_range')}-{end - 1}/{len(data)}"
        self.answer(206, memoryview(data)[begin:end], {**headers, "Content-Range": content_range}, fault)


class HubHandler(_Handler):
    def route(self, path: str, fault: Fault | None) -> None:
        url = urlsplit(path)
        api = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree|xet-read-token)/([^/]+)(?:/(.+))?)?", url.path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", url.path)
        match = api or file
        if match and match[1] in self.hub.moved:
            self.answer(307, b"", {"Location": self.path.replace(match[1], self.hub.moved[match[1]], 1)})
            return
        repo = self.hub.repos.get(match[1]) if match else None
        allowed = self.headers.get("authorization") == f"Bearer {TOKEN}"
        if match is None or repo is None or (repo.access == "private" and not allowed):
            self.refuse(404 if allowed else 401, "RepoNotFound")
            return
        revision = (api[3] if api else match[2]) or "main"
        sha = repo.refs.get(revision, revision)
        if sha not in repo.commits:
            self.refuse(404, "RevisionNotFound")
        elif file is not None:
            if repo.access == "gated" and not allowed:
                self.refuse(403, "GatedRepo")
            else:
                self.resolve(sha, repo, file[3], fault)
        elif api is not None and api[2] == "xet-read-token":
            exp = int(time.time()) + 3600
            self.answer_json({"casUrl": self.hub.cas_url, "accessToken": "short-lived", "exp": exp}, {})
        elif api is not None and api[2] == "tree":
            self.tree(match[1], sha, repo, api[4] or "", parse_qs(url.query))
        else:
            self.answer_json({"id": match[1], "sha": sha, "siblings": []}, {"X-Repo-Commit": sha})

    def tree(
        self,
        repo_id: str,
        sha: str,
        repo: Repo,
        folder: str,
        query: Mapping[str, list[str]],
    ) -> None:
        files = repo.commits[sha]
        prefix = f"{folder}/" if folder else ""
        names = sorted(n for n in files if n.startswith(prefix))
        if not names:
            self.refuse(404, "EntryNotFound")
            return
        start = int(query.get("cursor", ["0"])[0])
        entries = []
        for name in names[start : start + PAGE]:
            size = len(files[name])
            entry: dict[str, object] = {"type": "file", "path": name, "size": size, "oid": "0" * 40}
            if is_large(name):
                sha256 = repo.sha256(files[name])
                if name in repo.xet_hashes:
                    entry["xetHash"] = repo.xet_hashes[name]
                entry["lfs"] = {"oid": sha256, "size": size, "pointerSize": 134}
            entries.append(entry)
        headers = {}
        if start + PAGE < len(names):
            place = f"/api/models/{repo_id}/tree/{sha}/{folder}".rstrip("/")
            next_page = f"{self.hub.url}{place}?recursive=True&cursor={start + PAGE}"
            headers["Link"] = f'<{next_page}>; rel="next"'
        self.answer_json(entries, headers)

    def resolve(self, sha: str, repo: Repo, name: str, fault: Fault | None) -> None:
        files = repo.commits[sha]
        if name not in files:
            self.refuse(404, "EntryNotFound")
            return
        data = files[name]
        if not is_large(name):
            self.answer_file(data, {"X-Repo-Commit": sha, "ETag": f'"{hashlib.sha1(data).hexdigest()}"'}, fault)
            return
        sha256 = repo.sha256(data)
        headers = {
            "X-Repo-Commit": sha,
            "X-Linked-Etag": f'"{sha256}"',
            "X-Linked-Size": str(len(data)),
            "Location": f"{self.hub.storage_url}/store/{sha256}?signature={self.hub.sign()}",
        }
        self.answer(302, b"moved, as the real one says at some length", headers)


class StorageHandler(_Handler):
    def route(self, path: str, fault: Fault | None) -> None:
        url = urlsplit(path)
        signature = parse_qs(url.query)["signature"][0]
        if not self.hub.accept(signature, void=fault is not None and fault.kind == "expire"):
            self.answer(403, b"<Error>expired</Error>", {})
            return
        wanted = url.path.removeprefix("/store/")
        data = next((d for repo in self.hub.repos.values() if (d := repo.find(wanted)) is not None), None)
        if data is None:
            self.answer(404, b"", {})
        else:
            self.answer_file(data, {"ETag": f'"{wanted}"'}, fault)


class FakeHub:
    """Two servers, a set of repos, a log and a list of faults."""

    hub_handler: ClassVar[type[_Handler]] = HubHandler
    storage_handler: ClassVar[type[_Handler]] = StorageHandler

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.moved: dict[str, str] = {}  # renamed repos: old id -> new id
        self.log: list[Seen] = []
        self.faults: list[Fault] = []
        self.cas_url = ""  # of the Xet storage; "local://folder" needs no server
        self.signature_uses: int | None = None  # how often a signed storage address may be used
        self.signature_s: float | None = None  # and for how long
        self.signatures: dict[str, tuple[int | None, float]] = {}  # uses left, when it was issued
        self.lock = threading.Lock()
        self.closing = threading.Event()
        self.servers = [self._serve("hub"), self._serve("storage")]
        self.url, self.storage_url = (f"http://127.0.0.1:{s.server_address[1]}" for s in self.servers)

    def connections(self) -> int:
        """How many are open."""
        return sum(server.open for server in self.servers)

    def wait_until_left(self, before: int) -> None:
        """Wait for the end of the connections of a client that is dead, `before` which there were some: all that it has
        asked for is in the log then."""
        time.sleep(5 * POLL_S)  # those that wait to be accepted
        deadline_s = time.monotonic() + LEAVING_S
        while self.connections() > before:
            assert time.monotonic() < deadline_s, "somebody is still connected"
            time.sleep(POLL_S)

    def _serve(self, name: Literal["hub", "storage"]) -> _Server:
        base = self.hub_handler if name == "hub" else self.storage_handler
        handler = type(base.__name__, (base,), {"hub": self, "origin": name})
        server = _Server(("127.0.0.1", 0), handler)
        threading.Thread(target=server.serve_forever, args=(POLL_S,), daemon=True).start()
        return server

    def close(self) -> None:
        self.closing.set()
        for server in self.servers:
            server.shutdown()
            server.server_close()

    def seen(self, pattern: str, method: str = "GET") -> list[Seen]:
        with self.lock:
            return [s for s in self.log if s.method == method and re.search(pattern, s.path)]

    def take_fault(self, path: str, method: str = "GET") -> Fault | None:
        return self.take_first(self.faults, lambda f: re.search(f.path, path) and re.search(f.method, method))

    def take_first(self, faults: Iterable[FaultT], hits: Callable[[FaultT], object]) -> FaultT | None:
        """The first that hits the request and is to happen: not yet often enough, and not with one of those to skip."""
        with self.lock:
            for fault in faults:
                if fault.times > 0 and hits(fault):
                    if fault.skip > 0:
                        fault.skip -= 1
                        continue
                    fault.times -= 1
                    return fault
        return None

    def sign(self) -> str:
        """A new signature for a storage address."""
        with self.lock:
            signature = f"s{len(self.signatures)}"
            self.signatures[signature] = (self.signature_uses, time.monotonic())
        return signature

    def accept(self, signature: str, void: bool) -> bool:
        """Is a signature still good? `void`: not from now on."""
        with self.lock:
            uses, issued_at = self.signatures[signature]
            if void or uses == 0 or (self.signature_s is not None and time.monotonic() - issued_at > self.signature_s):
                self.signatures[signature] = (0, issued_at)
                return False
            self.signatures[signature] = (None if uses is None else uses - 1, issued_at)
        return True
