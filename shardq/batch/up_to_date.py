"""What a batch has to do: the source's newest commit and the recipe against what destinations record.

Two requests for a repo that is up to date: where the source stands, which is asked once for all that is made of it, and
the destination's shardq.json. Threads ask for several at a time.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from shardq.batch.manifest import Entry, Model
from shardq.batch.state import Standing, StatusFile
from shardq.errors import HubAccess, ShardqError
from shardq.outputs import is_of_recipe
from shardq.publish import is_complete, recorded_identity
from shardq.recipe import Recipe
from shardq.sources import names_a_repo
from shardq.staging import WORK
from shardq.version import NUMERICS, VERSION

if TYPE_CHECKING:
    from shardq.destinations.hub_client import HubClient

THREADS: Final = 8
_COMMIT_LETTERS: Final = 40


@dataclass(frozen=True, slots=True)
class Look:
    """What there is to do for an entry."""

    entry: Entry
    commit: str | None  # of the source now; None for a folder, or if it could not be asked
    done: bool
    why: str  # in words: what is out of date
    pushed_commit: str | None = None  # of the destination, if it was asked
    error: ShardqError | None = None  # there is no knowing


def look_at_all(models: Sequence[Model], status: StatusFile) -> dict[str, Look]:
    """A look at every entry, by label. What the Hub refuses is the error of the entries that it concerns."""
    client = make_client() if any(m.is_repo for m in models) else None
    looks: dict[str, Look] = {}
    with ThreadPoolExecutor(THREADS) as pool:
        heads = {m: pool.submit(partial(_find_head, client, *m)) for m in {(m.source, m.revision) for m in models}}
        records = {e.label: pool.submit(partial(_find_record, client, e)) for m in models for e in m.entries}
        for m in models:
            for e in m.entries:
                try:
                    commit, record = heads[m.source, m.revision].result(), records[e.label].result()
                    looks[e.label] = _compare(m, e, commit, record, status.get(e.label))
                except ShardqError as error:
                    looks[e.label] = Look(e, None, False, "the Hub cannot be asked", error=error)
    return looks


def identify(recipe: Recipe) -> str:
    """A short name of all that a recipe says, and of the version that reads it so, for the status file."""
    text = json.dumps([VERSION, recipe.as_dict()], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class _Record:
    """What a destination says about itself."""

    identity: Mapping[str, Any] | None
    commit: str | None


def _compare(model: Model, e: Entry, commit: str | None, record: _Record, before: Standing | None) -> Look:
    if not model.is_repo:
        return Look(e, None, False, "a source here: the run itself compares")
    if e.mixture:
        return Look(e, commit, False, "its mixture is to be chosen", record.commit)
    why = _difference(model, e, commit, record.identity, before)
    if not why and _is_left_over(e):
        why = "what a stopped run left here is to be cleared away"
    if not why and e.repo and e.stays:
        local = recorded_identity(e.out) if is_complete(e.out) else None
        why = _difference(model, e, commit, local, before) and "the folder here is missing, or another one"
    return Look(e, commit, not why, why or "up to date", record.commit)


def _is_left_over(e: Entry) -> bool:
    """True if a run that was stopped while it cleared up has left something: what it worked with, or, of an output
    that is elsewhere, its folder."""
    try:
        names = os.listdir(e.out)
    except (FileNotFoundError, NotADirectoryError):  # also one that a batch at work has removed just now
        return False
    return WORK in names or (not e.stays and not names)


def _difference(
    model: Model, e: Entry, commit: str | None, identity: Mapping[str, Any] | None, before: Standing | None
) -> str:
    """Why an output with this identity is not the one that is wanted; empty if it is."""
    if identity is None:
        return "nothing is there yet"
    if identity.get("source.label") != model.source:
        return f"it was made of {identity.get('source.label')}"
    if identity.get("source.commit") != commit:
        return f"the source has moved to commit {commit and commit[:12]}"
    if not is_of_recipe(identity, e.recipe):
        return "the recipe has changed"
    if identity.get("numerics") != NUMERICS:
        return "this version of shardq gives other numbers"
    if model.subfolder and (before is None or before.subfolder != model.subfolder):
        return "no record says of which subfolder it was made"
    return ""


def _find_head(client: "HubClient | None", source: str, revision: str | None) -> str | None:
    """The commit of the source's revision; no request for a whole commit."""
    revision = revision or "main"
    if client is None or not names_a_repo(source):
        return None
    if len(revision) == _COMMIT_LETTERS and set(revision) <= set("0123456789abcdef"):
        return revision
    from shardq.destinations.hub_tree import read_head

    return read_head(client.of(source, revision)).commit


def _find_record(client: "HubClient | None", e: Entry) -> _Record:
    if client is None:
        return _Record(None, None)
    if e.repo is None:
        return _Record(recorded_identity(e.out) if is_complete(e.out) else None, None)
    from shardq.destinations.hub_tree import read_published

    repo, _, branch = e.repo.partition("@")
    record, commit = read_published(client.of(repo, branch or "main"))
    identity = record.get("identity") if record else None
    return _Record(identity if isinstance(identity, dict) else None, commit)


def make_client() -> "HubClient":
    """A client for any repo: connections and certificates are shared. Raises HubAccess when the library is offline."""
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE:
        raise HubAccess("offline (HF_HUB_OFFLINE), and a batch asks where sources stand: unset it, or give folders")
    from shardq.destinations.hub_client import HubClient
    from shardq.sources.hub_errors import RetryPolicy

    policy = RetryPolicy(timeout_s=float(constants.HF_HUB_DOWNLOAD_TIMEOUT))
    return HubClient(HfApi().endpoint, "", "main", policy)
