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
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar, Literal
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_test_token"
PAGE = 4  # entries of a tree listing per page


@dataclass(frozen=True)
class Seen:
    """One request that arrived."""

    origin: Literal["hub", "storage"]
    method: str
    path: str
    range: str | None
    authorization: str | None


@dataclass
class Fault:
    """What to do wrong, with which requests, how often."""

    kind: Literal["status", "drop", "corrupt", "ignore_range", "wrong_range"]
    path: str  # regular expression, searched in the path
    times: int = 1
    status: int = 503
    headers: Mapping[str, str] = field(default_factory=dict)
    # drop: bytes sent before the connection is reset; corrupt: offset of the flipped bit
    at: int = 0
    skip: int = 0  # let this many matching requests pass first


@dataclass
class Repo:
    """A model repo: whole trees by commit, and names for commits."""

    commits: dict[str, Mapping[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    access: Literal["public", "private", "gated"] = "public"

    def commit(self, files: Mapping[str, bytes], ref: str = "main") -> str:
        sha = hashlib.sha1(repr((len(self.commits), sorted(files))).encode()).hexdigest()
        self.commits[sha] = dict(files)
        self.refs[ref] = sha
        return sha


def is_large(path: str) -> bool:
    return path.endswith((".safetensors", "tokenizer.json"))


class FakeHub:
    """Two servers, a set of repos, a log and a list of faults."""

    hub_handler: ClassVar[type["_Handler"]]
    storage_handler: ClassVar[type["_Handler"]]

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.log: list[Seen] = []
        self.faults: list[Fault] = []
        self.lock = threading.Lock()
        self.servers = [self._serve("hub"), self._serve("storage")]
        self.url, self.storage_url = (f"http://127.0.0.1:{s.server_address[1]}" for s in self.servers)

    def _serve(self, name: Literal["hub", "storage"]) -> ThreadingHTTPServer:
        base = self.hub_handler if name == "hub" else self.storage_handler
        handler = type(base.__name__, (base,), {"hub": self, "origin": name})
        server = _Server(("127.0.0.1", 0), handler)
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        return server

    def close(self) -> None:
        for server in self.servers:
            server.shutdown()
            server.server_close()

    def seen(self, pattern: str, method: str = "GET") -> list[Seen]:
        with self.lock:
            return [s for s in self.log if s.method == method and re.search(pattern, s.path)]

    def take_fault(self, path: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.times > 0 and re.search(fault.path, path):
                    if fault.skip > 0:
                        fault.skip -= 1
                        continue
                    fault.times -= 1
                    return fault
        return None


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # clients hang up as they please
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    hub: ClassVar[FakeHub]
    origin: ClassVar[Literal["hub", "storage"]]
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, template: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        self.begin(self.route_write)

    do_PUT = do_DELETE = do_POST

    def do_GET(self) -> None:
        self.begin(self.route)

    def begin(self, route: Callable[[str, Fault | None], None]) -> None:
        path = unquote(self.path)
        seen = Seen(
            self.origin,
            self.command,
            path,
            self.headers.get("range"),
            self.headers.get("authorization"),
        )
        with self.hub.lock:
            self.hub.log.append(seen)
        fault = self.hub.take_fault(path)
        if fault is not None and fault.kind == "status":
            self.answer(fault.status, b"", dict(fault.headers))
        else:
            route(path, fault)

    def route(self, path: str, fault: Fault | None) -> None:
        raise NotImplementedError

    def route_write(self, path: str, fault: Fault | None) -> None:
        self.answer(405, b"", {})

    def answer(self, status: int, body: bytes, headers: Mapping[str, str], drop_at: int | None = None) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        self.wfile.write(body if drop_at is None else body[:drop_at])
        if drop_at is not None:
            self.wfile.flush()
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.shutdown(socket.SHUT_RD)
            self.close_connection = True

    def answer_json(self, value: object, headers: Mapping[str, str]) -> None:
        self.answer(200, json.dumps(value).encode(), {"Content-Type": "application/json", **headers})

    def refuse(self, status: int, code: str) -> None:
        self.answer(status, b"", {"X-Error-Code": code, "X-Error-Message": code})

    def answer_file(self, data: bytes, headers: Mapping[str, str], fault: Fault | None) -> None:
        if fault is not None and fault.kind == "corrupt":
            data = data[: fault.at] + bytes([data[fault.at] ^ 1]) + data[fault.at + 1 :]
        drop_at = fault.at if fault is not None and fault.kind == "drop" else None
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("range") or "")
        if match is None or (fault is not None and fault.kind == "ignore_range"):
            self.answer(200, data, headers, drop_at)
            return
        begin, end = int(match[1]), min(int(match[2] or len(data) - 1) + 1, len(data))
        if begin >= len(data):
            self.answer(416, b"", {"Content-Range": f"bytes */{len(data)}"})
            return
        shift = 1 if fault is not None and fault.kind == "wrong_range" else 0
        content_range = f"bytes {begin + shift}-{end - 1}/{len(data)}"
        self.answer(206, data[begin:end], {**headers, "Content-Range": content_range}, drop_at)


class _HubHandler(_Handler):
    def route(self, path: str, fault: Fault | None) -> None:
        url = urlsplit(path)
        api = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+)(?:/(.+))?)?", url.path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", url.path)
        match = api or file
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
                self.resolve(sha, repo.commits[sha], file[3], fault)
        elif api is not None and api[2] == "tree":
            self.tree(match[1], sha, repo.commits[sha], api[4] or "", parse_qs(url.query))
        else:
            self.answer_json({"id": match[1], "sha": sha, "siblings": []}, {"X-Repo-Commit": sha})

    def tree(
        self,
        repo: str,
        sha: str,
        files: Mapping[str, bytes],
        folder: str,
        query: Mapping[str, list[str]],
    ) -> None:
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
                sha256 = hashlib.sha256(files[name]).hexdigest()
                entry["lfs"] = {"oid": sha256, "size": size, "pointerSize": 134}
            entries.append(entry)
        headers = {}
        if start + PAGE < len(names):
            place = f"/api/models/{repo}/tree/{sha}/{folder}".rstrip("/")
            next_page = f"{self.hub.url}{place}?recursive=True&cursor={start + PAGE}"
            headers["Link"] = f'<{next_page}>; rel="next"'
        self.answer_json(entries, headers)

    def resolve(self, sha: str, files: Mapping[str, bytes], name: str, fault: Fault | None) -> None:
        if name not in files:
            self.refuse(404, "EntryNotFound")
            return
        data = files[name]
        if not is_large(name):
            self.answer_file(data, {"X-Repo-Commit": sha, "ETag": f'"{hashlib.sha1(data).hexdigest()}"'}, fault)
            return
        sha256 = hashlib.sha256(data).hexdigest()
        headers = {
            "X-Repo-Commit": sha,
            "X-Linked-Etag": f'"{sha256}"',
            "X-Linked-Size": str(len(data)),
            "Location": f"{self.hub.storage_url}/store/{sha256}?signature=abc",
        }
        self.answer(302, b"", headers)


class _StorageHandler(_Handler):
    def route(self, path: str, fault: Fault | None) -> None:
        wanted = urlsplit(path).path.removeprefix("/store/")
        for repo in self.hub.repos.values():
            for files in repo.commits.values():
                for data in files.values():
                    if hashlib.sha256(data).hexdigest() == wanted:
                        self.answer_file(data, {"ETag": f'"{wanted}"'}, fault)
                        return
        self.answer(404, b"", {})


FakeHub.hub_handler = _HubHandler
FakeHub.storage_handler = _StorageHandler
