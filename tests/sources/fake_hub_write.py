"""The fake Hub with the routes that write: repos, branches, storage of large files, commits, and scripted faults."""

import base64
import hashlib
import itertools
import json
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal, cast
from urllib.parse import unquote, urlsplit

import yaml
from fake_hub import TOKEN, FakeHub, Fault, HubHandler, Repo, StorageHandler, _Handler, is_large

READ_TOKEN = "hf_read_only_token"
PAGE = 4  # entries of a tree listing per page
ATTRIBUTES = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"


@dataclass
class WriteFault:
    """What to do wrong, with which requests that write, how often."""

    # status: refuse; drop_put: reset the connection after `at` bytes of the body; lose_reply: do it, then reset;
    # reject_hash: say that the content is not what was promised; stall: wait until the hub closes, then reset
    kind: Literal["status", "drop_put", "lose_reply", "reject_hash", "stall"]
    path: str  # regular expression, searched in the path
    method: str = ""  # any
    times: int = 1
    status: int = 503
    headers: Mapping[str, str] = field(default_factory=dict)
    at: int = 0
    skip: int = 0  # let this many matching requests pass first


@dataclass(frozen=True)
class Commit:
    """One commit that was made."""

    repo: str
    branch: str
    oid: str
    parent: str
    message: str


class WritableHub(FakeHub):
    """A FakeHub that takes uploads and commits."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}  # storage, by sha256
        self.parts: dict[int, dict[int, bytes]] = {}  # of uploads that are not complete
        self.part_bytes: int | None = None  # larger files are sent in parts
        self.xet_folder = ""  # where the real Xet client keeps what it is given, without any server
        self.commits: list[Commit] = []
        self.collections: dict[str, list[str]] = {}  # by slug, which is owner/title here: repos in them
        self.write_faults: list[WriteFault] = []
        self.before_commit: Callable[[], None] | None = None  # called once, when the next commit arrives
        self.counter = itertools.count(1)
        self.commit_lock = threading.Lock()
        super().__init__()

    def take_write_fault(self, method: str, path: str) -> WriteFault | None:
        return self.take_first(self.write_faults, lambda f: f.method in ("", method) and re.search(f.path, path))

    def add_repo(self, name: str, private: bool = False) -> Repo:
        """A new repo, with the one file that a new repo has."""
        repo = Repo(access="private" if private else "public")
        repo.commit({".gitattributes": ATTRIBUTES})
        self.repos[name] = repo
        return repo

    def edit(self, name: str, files: Mapping[str, bytes], branch: str = "main") -> str:
        """Somebody else's commit."""
        repo = self.repos[name]
        return repo.commit({**repo.commits[repo.refs[branch]], **files}, branch)

    def files(self, name: str, branch: str = "main") -> dict[str, bytes]:
        repo = self.repos[name]
        return dict(repo.commits[repo.refs[branch]])

    def collect_garbage(self) -> None:
        """Drop what is in storage and in no commit."""
        used = {
            hashlib.sha256(data).hexdigest()
            for repo in self.repos.values()
            for files in repo.commits.values()
            for data in files.values()
        }
        self.objects = {oid: data for oid, data in self.objects.items() if oid in used}


class _Writing(_Handler):
    """Reads the body, applies the faults of writing, and hands over to `write`."""

    body = b""
    write_fault: WriteFault | None = None

    @property
    def writable(self) -> WritableHub:
        return cast("WritableHub", self.hub)

    def do_POST(self) -> None:
        if self.receive():
            super().do_POST()

    def do_PUT(self) -> None:
        if self.receive():
            super().do_PUT()

    def receive(self) -> bool:
        """Read the body; False if a fault has ended the connection."""
        fault = self.write_fault = self.writable.take_write_fault(self.command, unquote(self.path))
        if fault is not None and fault.kind in ("drop_put", "stall"):
            self.rfile.read(fault.at)
            if fault.kind == "stall":
                self.writable.closing.wait()
            self.reset()
            return False
        self.body = self.rfile.read(int(self.headers.get("content-length") or 0))
        return True

    def route_write(self, path: str, fault: Fault | None) -> None:
        kind = self.write_fault.kind if self.write_fault is not None else ""
        if self.write_fault is not None and kind == "status":
            self.answer(self.write_fault.status, b"", dict(self.write_fault.headers))
        elif kind == "reject_hash":
            self.answer(400, b"<Error><Code>BadDigest</Code></Error>", {})
        else:
            self.write(urlsplit(path).path, json.loads(self.body) if self.is_json() else {})

    def write(self, path: str, body: Any) -> None:
        raise NotImplementedError

    def is_json(self) -> bool:
        kind = self.headers.get("content-type") or ""
        return kind.endswith("json") and "ndjson" not in kind

    def answer(
        self, status: int, body: bytes | memoryview, headers: Mapping[str, str], fault: Fault | None = None
    ) -> None:
        if self.write_fault is not None and self.write_fault.kind == "lose_reply":
            self.reset()
        else:
            super().answer(status, body, headers, fault)

    def say(self, status: int, message: str) -> None:
        self.answer(status, json.dumps({"error": message}).encode(), {"Content-Type": "application/json"})


class WritingHubHandler(_Writing, HubHandler):
    """The Hub's own origin."""

    def route(self, path: str, fault: Fault | None) -> None:
        info = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", urlsplit(path).path)
        repo = self.hub.repos.get(info[1]) if info else None
        if found := re.fullmatch(r"/api/collections/(.+)", urlsplit(path).path):
            self.answer_json(_collection(found[1]), {})
        elif path == "/api/whoami-v2" and self.rights():
            self.answer_json({"name": "me", "auth": {"accessToken": {"role": self.rights()}}}, {})
        elif re.fullmatch(r"/api/models/[^/]+/[^/]+/xet-write-token/[^/]+", path) and self.rights() == "write":
            expires = {"X-Xet-Access-Token": "xet", "X-Xet-Token-Expiration": "4000000000"}
            headers = {"X-Xet-Cas-Url": f"local://{self.writable.xet_folder}", **expires}
            body = {"casUrl": headers["X-Xet-Cas-Url"], "accessToken": "xet", "exp": 4000000000}
            self.answer_json(body, headers)
        elif made := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commits/([^/]+)", urlsplit(path).path):
            of = self.hub.repos[made[1]]
            date = datetime.fromtimestamp(of.made_at_s[of.refs[made[2]]], UTC).isoformat()
            self.answer_json([{"id": of.refs[made[2]], "title": "", "date": date}], {})
        elif info and repo and (repo.access != "private" or self.rights()):
            sha = repo.refs.get(info[2] or "main", info[2])
            if sha in repo.commits:
                self.answer_json({"id": info[1], "sha": sha, "private": repo.access == "private", "siblings": []}, {})
            else:
                self.refuse(404, "RevisionNotFound")
        else:
            super().route(path, fault)

    def rights(self) -> Literal["", "read", "write"]:
        token = (self.headers.get("authorization") or "").removeprefix("Bearer ")
        return "write" if token == TOKEN else "read" if token == READ_TOKEN else ""

    def tree(self, repo_id: str, sha: str, repo: Repo, folder: str, query: Mapping[str, list[str]]) -> None:
        files = repo.commits[sha]
        start = int(query.get("cursor", ["0"])[0])
        names = sorted(files)
        entries = [_entry(name, files[name]) for name in names[start : start + PAGE]]
        headers = {}
        if start + PAGE < len(names):
            page = f"{self.hub.url}/api/models/{repo_id}/tree/{sha}?recursive=True&cursor={start + PAGE}"
            headers["Link"] = f'<{page}>; rel="next"'
        self.answer_json(entries, headers)

    def write(self, path: str, body: Any) -> None:
        if path == "/api/validate-yaml":
            self.validate_card(body["content"])
            return
        if match := re.fullmatch(r"/complete/(\d+)", path):  # a signed address: no token
            self.complete(int(match[1]), body)
            return
        if self.rights() != "write":
            self.refuse(403 if self.rights() else 401, "Forbidden")
            return
        api = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(branch|preupload|commit)/([^/]+)", path)
        lfs = re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/(objects/batch|verify)", path)
        name = api[1] if api else lfs[1] if lfs else ""
        repo = self.hub.repos.get(name)
        if path == "/api/collections":
            slug = f"{body['namespace']}/{body['title']}"
            known = slug in self.writable.collections
            self.writable.collections.setdefault(slug, [])
            self.answer_json(_collection(slug), {}) if not known else self.conflict(slug)
        elif added := re.fullmatch(r"/api/collections/(.+)/items", path):
            items = self.writable.collections[added[1]]
            if body["item"]["id"] in items:
                self.conflict(added[1])
            else:
                items.append(body["item"]["id"])
                self.answer_json(_collection(added[1]), {})
        elif path == "/api/repos/create":
            self.create(body)
        elif repo is None:
            self.refuse(404, "RepoNotFound")
        elif lfs:
            (self.batch if lfs[2] == "objects/batch" else self.verify)(body)
        elif api and api[2] == "branch":
            self.branch(repo, api[3], body)
        elif api and api[3] not in repo.refs:
            self.refuse(404, "RevisionNotFound")
        elif api and api[2] == "preupload":
            files = [
                {"path": f["path"], "uploadMode": "lfs" if is_large(f["path"]) else "regular"} for f in body["files"]
            ]
            self.answer_json({"files": [{**f, "shouldIgnore": False} for f in files]}, {})
        elif api:
            self.commit(name, repo, api[3])

    def conflict(self, slug: str) -> None:
        self.answer(409, json.dumps({"slug": slug}).encode(), {"Content-Type": "application/json"})

    def create(self, body: Any) -> None:
        name = f"{body['organization']}/{body['name']}"
        if name in self.hub.repos:
            status = 409
        else:
            status = 200
            self.writable.add_repo(name, body.get("visibility") == "private" or body.get("private") is True)
        self.answer(status, json.dumps({"url": f"{self.hub.url}/{name}"}).encode(), {})

    def branch(self, repo: Repo, branch: str, body: Any) -> None:
        known = branch in repo.refs
        repo.refs.setdefault(branch, repo.refs[body.get("startingPoint", "main")])
        self.answer(409 if known else 201, b"", {})

    def batch(self, body: Any) -> None:
        objects = []
        for item in body["objects"]:
            oid, size = item["oid"], item["size"]
            if oid in self.writable.objects:
                objects.append({"oid": oid, "size": size})
                continue
            repo = self.path.removesuffix("/objects/batch")
            upload: dict[str, Any] = {"href": f"{self.hub.storage_url}/put/{oid}?signature=abc"}
            if self.writable.part_bytes is not None and size > self.writable.part_bytes:
                upload = self.parts_of(oid, size, self.writable.part_bytes)
            verify = {"href": f"{self.hub.url}{repo}/verify"}
            objects.append({"oid": oid, "size": size, "actions": {"upload": upload, "verify": verify}})
        self.answer_json({"transfer": "basic", "objects": objects}, {})

    def parts_of(self, oid: str, size: int, part_bytes: int) -> dict[str, Any]:
        number = next(self.writable.counter)
        self.writable.parts[number] = {}
        place = f"{self.hub.storage_url}/part/{number}"
        header = {f"{p:05d}": f"{place}/{p}?signature=abc" for p in range(1, -(-size // part_bytes) + 1)}
        return {"href": f"{self.hub.url}/complete/{number}", "header": {"chunk_size": str(part_bytes), **header}}

    def complete(self, number: int, body: Any) -> None:
        parts = self.writable.parts.pop(number, {})
        data = b"".join(parts[p] for p in sorted(parts))
        given = [(p["partNumber"], p["etag"]) for p in body["parts"]]
        if given != [(p, _etag(parts[p])) for p in sorted(parts)] or hashlib.sha256(data).hexdigest() != body["oid"]:
            self.say(400, "these are not the parts")
            return
        self.writable.objects[body["oid"]] = data
        self.answer(200, b"", {})

    def verify(self, body: Any) -> None:
        data = self.writable.objects.get(body["oid"])
        self.answer(200 if data is not None and len(data) == body["size"] else 404, b"", {})

    def validate_card(self, text: str) -> None:
        problem = _card_problem(text)
        reply = {"errors": [{"message": problem}] if problem else [], "warnings": []}
        self.answer(400 if problem else 200, json.dumps(reply).encode(), {"Content-Type": "application/json"})

    def commit(self, name: str, repo: Repo, branch: str) -> None:
        hook, self.writable.before_commit = self.writable.before_commit, None
        if hook is not None:
            hook()
        lines = [json.loads(line) for line in self.body.splitlines()]
        header = lines[0]["value"]
        with self.writable.commit_lock:
            parent = repo.refs[branch]
            if header.get("parentCommit", parent) != parent:
                self.say(412, "A commit has happened since. Please refresh and try again.")
                return
            files = dict(repo.commits[parent])
            for line in lines[1:]:
                problem = self.apply(files, line["key"], line["value"])
                if problem is not None:
                    self.say(*problem)
                    return
            oid = parent
            if files != repo.commits[parent]:
                oid = repo.commit(files, branch)
                self.writable.commits.append(Commit(name, branch, oid, parent, header["summary"]))
        self.answer_json({"commitOid": oid, "commitUrl": f"{self.hub.url}/{name}/commit/{oid}"}, {})

    def apply(self, files: dict[str, bytes], key: str, value: Any) -> tuple[int, str] | None:
        """One line of a commit; the refusal if there is one."""
        path = value["path"]
        if key == "deletedFile":
            return None if files.pop(path, None) is not None else (404, "A file with this name doesn't exist")
        if key == "lfsFile":
            data = self.writable.objects.get(value["oid"])
            if data is None or value["algo"] != "sha256" or value["size"] != len(data):
                return 400, f"LFS pointer of {path} points to a file that does not exist"
            files[path] = data
            return None
        data = files[path] = base64.b64decode(value["content"])
        problem = _card_problem(data.decode()) if path == "README.md" else None
        return (400, problem) if problem else None


class WritingStorageHandler(_Writing, StorageHandler):
    """Where large files go, with signed addresses."""

    def write(self, path: str, body: Any) -> None:
        if "signature=abc" not in self.path:
            self.answer(403, b"<Error><Code>AccessDenied</Code></Error>", {})
        elif match := re.fullmatch(r"/part/(\d+)/(\d+)", path):
            if int(match[1]) not in self.writable.parts:
                self.answer(404, b"<Error><Code>NoSuchUpload</Code></Error>", {})
                return
            self.writable.parts[int(match[1])][int(match[2])] = self.body
            self.answer(200, b"", {"ETag": _etag(self.body)})
        elif hashlib.sha256(self.body).hexdigest() != path.removeprefix("/put/"):
            self.answer(400, b"<Error><Code>BadDigest</Code></Error>", {})
        else:
            self.writable.objects[path.removeprefix("/put/")] = self.body
            self.answer(200, b"", {})


WritableHub.hub_handler = WritingHubHandler
WritableHub.storage_handler = WritingStorageHandler


def _collection(slug: str) -> dict[str, object]:
    owner, _, title = slug.partition("/")
    plain = {"items": [], "lastUpdated": "2026-01-01T00:00:00.000Z", "position": 0, "private": False, "upvotes": 0}
    return {"slug": slug, "title": title, "owner": {"name": owner}, "theme": "blue", **plain}


def _entry(name: str, data: bytes) -> dict[str, object]:
    entry: dict[str, object] = {"type": "file", "path": name, "size": len(data), "oid": _git_hash(data)}
    if is_large(name):
        oid = hashlib.sha256(data).hexdigest()
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{oid}\nsize {len(data)}\n".encode()
        entry |= {"oid": _git_hash(pointer), "lfs": {"oid": oid, "size": len(data), "pointerSize": len(pointer)}}
    return entry


def _git_hash(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _etag(data: bytes) -> str:
    return f'"{hashlib.md5(data).hexdigest()}"'


def _card_problem(text: str) -> str | None:
    """Why the Hub would refuse the front matter of a card."""
    if not text.startswith("---"):
        return None
    try:
        front = yaml.safe_load(text[3:].partition("\n---")[0])
    except yaml.YAMLError:
        return "Invalid YAML in README.md"
    if isinstance(front, dict) and not isinstance(front.get("license", ""), str):
        return '"license" must be a string'
    return None
