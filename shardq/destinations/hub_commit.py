"""One commit of a whole output: its text, and making it exactly once whatever happens to the answer.

A commit names its parent, so the Hub takes it at most once. After any doubt the branch is looked at before anything is
sent again.
"""

import base64
import hashlib
import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from shardq.destinations.base import StoredFile
from shardq.destinations.hub_client import HubClient, PassingError
from shardq.destinations.hub_tree import Snapshot, read_head, read_record, read_snapshot
from shardq.errors import HubAccess
from shardq.staging import PROVENANCE

_MOVED: Final = frozenset({409, 412})
_NEVER_DELETED: Final = frozenset({".gitattributes"})  # says which files of the repo are in storage
_WHAT: Final = "the commit"


@dataclass(frozen=True, slots=True)
class Content:
    """What a commit shall bring."""

    files: Collection[StoredFile]
    small: Mapping[str, bytes]
    inline: Collection[str]  # those of the small files that travel in the commit; the others are in storage too
    message: str

    def stored(self) -> list[StoredFile]:
        """All files whose content must be in storage."""
        return [*self.files, *stored_small(self.small, self.inline)]


def stored_small(small: Mapping[str, bytes], inline: Collection[str]) -> list[StoredFile]:
    """The small files that are not `inline`."""
    return [
        StoredFile(name, len(data), hashlib.sha256(data).hexdigest())
        for name, data in small.items()
        if name not in inline
    ]


def encode_commit(content: Content, deleted: Iterable[str], parent: str) -> bytes:
    """The body of a commit: JSON lines, as huggingface_hub's `_commit_api` writes them."""
    header = {"summary": content.message, "description": "", "parentCommit": parent}
    lines: list[tuple[str, Mapping[str, object]]] = [("header", header)]
    for name in sorted(content.inline):
        text = base64.b64encode(content.small[name]).decode()
        lines.append(("file", {"content": text, "path": name, "encoding": "base64"}))
    lines += [
        ("lfsFile", {"path": f.name, "algo": "sha256", "oid": f.sha256, "size": f.size_bytes})
        for f in sorted(content.stored(), key=lambda f: f.name)
    ]
    lines += [("deletedFile", {"path": name}) for name in sorted(deleted)]
    return b"".join(json.dumps({"key": key, "value": value}).encode() + b"\n" for key, value in lines)


def commit_once(client: HubClient, content: Content, parent: str) -> str:
    """Make the commit on top of `parent`, or find that it has been made; returns the commit that holds the output.

    A branch that has moved since is followed, once after a refusal, as long as its shardq.json is the one of `parent`.
    Raises HubAccess (it holds another output now, or keeps moving), HubTransfer.
    """
    base = read_snapshot(client, parent)
    failure: PassingError | None = None
    failures, followed = 0, False
    while True:
        head = base if (at := read_head(client).commit) == base.commit else read_snapshot(client, at)
        if head.holds(content.files, content.small) or _is_ours(head, base, content):
            return head.commit
        if head.commit != base.commit:
            _refuse_strangers(client, head, base, followed)
            base, followed = head, failure is not None
        elif failure is not None:
            failures += 1
            client.retry.pause(failures, failure.asked_s, f"{client.repo}, {_WHAT}", str(failure))
        try:
            return _send(client, encode_commit(content, _leftovers(client, base, content), base.commit))
        except PassingError as error:
            failure = error


def _is_ours(head: Snapshot, base: Snapshot, content: Content) -> bool:
    """True if our commit was made and then a card or the like was edited."""
    files, small = content.files, content.small
    return head.is_output(files, small) and not base.is_output(files, small)


def _refuse_strangers(client: HubClient, head: Snapshot, base: Snapshot, followed: bool) -> None:
    if head.entries.get(PROVENANCE) != base.entries.get(PROVENANCE):
        raise HubAccess(
            f"{client.repo}, branch {client.branch}: commit {head.commit} brought another {PROVENANCE} while this run "
            f"worked on top of {base.commit}; look at who else publishes there, then run again or choose another branch"
        )
    if followed:
        raise HubAccess(
            f"{client.repo}, branch {client.branch}: keeps moving, now to commit {head.commit}; run the same command "
            "again when nobody else writes to it"
        )


def _leftovers(client: HubClient, base: Snapshot, content: Content) -> set[str]:
    """What the output at `base` lists as its own and the new one does not have."""
    if PROVENANCE not in base.entries:
        return set()
    record = read_record(client, base.commit) or {}
    listed: set[str] = set()
    for key in ("files", "others"):
        names = record.get(key)
        if isinstance(names, (dict, list)):
            listed |= {name for name in names if isinstance(name, str)}
    listed -= _NEVER_DELETED
    return (listed & base.entries.keys()) - {f.name for f in content.files} - content.small.keys()


def _send(client: HubClient, body: bytes) -> str:
    """One attempt. Raises PassingError whenever it may be in doubt what became of it."""
    url = f"{client.api}/commit/{client.quoted_branch}"
    headers = {"content-type": "application/x-ndjson"}
    response = client.send("POST", url, _WHAT, body, headers, _MOVED)
    if response.status_code in _MOVED:
        raise PassingError(f"the branch has moved (HTTP {response.status_code})")
    try:
        commit = response.json()["commitOid"]
    except (ValueError, KeyError, TypeError) as error:
        raise PassingError("the answer names no commit") from error
    if not isinstance(commit, str):
        raise PassingError("the answer names no commit")
    return commit
