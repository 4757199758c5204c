"""What a branch of a Hub repo holds at one commit, against what it should hold."""

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final

from shardq.destinations.base import StoredFile
from shardq.destinations.hub_client import HubClient
from shardq.errors import HubTransfer
from shardq.staging import PROVENANCE

if TYPE_CHECKING:
    import httpx2

_LISTING: Final = "the list of files"


@dataclass(frozen=True, slots=True)
class RemoteEntry:
    """One file of a commit."""

    blob: str  # git's hash of the file, or of the pointer to it
    size_bytes: int
    sha256: str | None  # of a file in large-file storage


@dataclass(frozen=True, slots=True)
class Head:
    """The commit that a branch stands at."""

    commit: str
    private: bool


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All files of one commit."""

    commit: str
    entries: Mapping[str, RemoteEntry]

    def holds_files(self, files: Collection[StoredFile]) -> bool:
        """True if all large files are there with their hashes."""
        found = ((f, self.entries.get(f.name)) for f in files)
        return all(e is not None and (e.sha256, e.size_bytes) == (f.sha256, f.size_bytes) for f, e in found)

    def holds_bytes(self, name: str, data: bytes) -> bool:
        """True if this file is there with this content."""
        entry = self.entries.get(name)
        if entry is None or entry.size_bytes != len(data):
            return False
        if entry.sha256 is not None:
            return entry.sha256 == hashlib.sha256(data).hexdigest()
        return entry.blob == git_hash(data)

    def holds(self, files: Collection[StoredFile], small: Mapping[str, bytes]) -> bool:
        """True if all of these are there."""
        return self.holds_files(files) and all(self.holds_bytes(name, data) for name, data in small.items())

    def is_output(self, files: Collection[StoredFile], small: Mapping[str, bytes]) -> bool:
        """True if this is the output of these files, though its card and the like may have been edited since."""
        return self.holds_files(files) and PROVENANCE in small and self.holds_bytes(PROVENANCE, small[PROVENANCE])


def git_hash(data: bytes) -> str:
    """The name that git gives to a file of this content."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def read_snapshot(client: HubClient, commit: str) -> Snapshot:
    """List a commit. Raises HubAccess, HubTransfer."""
    items = client.pages(f"{client.api}/tree/{commit}?recursive=true", _LISTING)
    try:
        return Snapshot(commit, {i["path"]: _entry(i) for i in items if i["type"] == "file"})
    except (KeyError, TypeError, AttributeError) as error:
        raise HubTransfer(
            f"{client.repo}: {_LISTING} is not what the Hub sends ({error!r}); check HF_ENDPOINT and proxies"
        ) from error


def _entry(item: Mapping[str, Any]) -> RemoteEntry:
    large = item.get("lfs")
    return RemoteEntry(item["oid"], item["size"], large["oid"] if large else None)


def read_head(client: HubClient) -> Head:
    """Where the branch stands. Raises HubAccess, HubTransfer."""
    what = f"branch {client.branch}"
    info = client.get_json(f"{client.api}/revision/{client.quoted_branch}", what)
    commit = info.get("sha") if isinstance(info, dict) else None
    if not isinstance(commit, str):
        raise HubTransfer(f"{client.repo}: the Hub names no commit for {what}; check HF_ENDPOINT and proxies")
    return Head(commit, bool(info.get("private")))


def read_date_s(client: HubClient) -> float:
    """When the newest commit of the branch was made, in seconds since 1970. Raises HubAccess, HubTransfer."""
    what = f"the commits of branch {client.branch}"
    commits = client.get_json(f"{client.api}/commits/{client.quoted_branch}?limit=1", what)
    try:
        return datetime.fromisoformat(commits[0]["date"]).timestamp()
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise HubTransfer(
            f"{client.repo}: {what} are not what the Hub sends ({error!r}); check HF_ENDPOINT and proxies"
        ) from error


def read_published(client: HubClient) -> tuple[dict[str, Any] | None, str | None]:
    """shardq.json at the branch's head and that commit, with one request; None for what is not there, or not shown to
    us. Raises HubAccess, HubTransfer."""
    url = f"{client.endpoint}/{client.repo}/resolve/{client.quoted_branch}/{PROVENANCE}"
    hidden = {401, 403, 404}
    response = client.patiently(lambda: client.send("GET", url, PROVENANCE, accepted=hidden), PROVENANCE)
    commit = response.headers.get("x-repo-commit")
    return (None, commit) if response.status_code in hidden else (_object(response), commit)


def read_record(client: HubClient, commit: str) -> dict[str, Any] | None:
    """shardq.json of a commit; None if it is no JSON object. Raises HubAccess, HubTransfer."""
    url = f"{client.endpoint}/{client.repo}/resolve/{commit}/{PROVENANCE}"
    return _object(client.patiently(lambda: client.send("GET", url, PROVENANCE), PROVENANCE))


def _object(response: "httpx2.Response") -> dict[str, Any] | None:
    """The JSON object of an answer; None if it is none."""
    try:
        record = response.json()
    except ValueError:
        return None
    return record if isinstance(record, dict) else None
