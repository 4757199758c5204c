"""A branch of a Hub repo as the place of an output: shards are stored while others are still being made, one commit at
the end shows everything at once.

huggingface_hub is imported inside functions only, so that importing this module stays light.
"""

import base64
import hashlib
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, Final

from shardq.destinations.base import OnBytes, StoredFile
from shardq.destinations.hub_client import HubClient, PassingError
from shardq.destinations.hub_commit import Content, commit_once, stored_small
from shardq.destinations.hub_tree import read_date_s, read_head, read_record, read_snapshot
from shardq.destinations.hub_xet import abort_xet, upload_xet
from shardq.destinations.lfs import ask_batch, bytes_chunks, file_chunks, slowed, upload_content
from shardq.destinations.watched import Meter, run_watched
from shardq.errors import ChecksumMismatch, HubAccess, HubTransfer
from shardq.files.atomic import reading
from shardq.pace import Pace
from shardq.sources.hub_errors import RETRY_STATUSES, RetryPolicy, explain_hub_error, server_wait_s
from shardq.staging import PROVENANCE
from shardq.version import VERSION

MAX_FILES: Final = 25_000  # large files that the Hub takes in one commit
MAIN: Final = "main"
_PROBE: Final = b"shardq asks whether it may write"  # never sent: only its hash is
_MODES_FILES: Final = 256  # as many as huggingface_hub asks about at once
_SAMPLE_BYTES: Final = 512


class HubDestination:
    """A branch of a model repo; see `Destination`. `prepare` comes first."""

    def __init__(
        self,
        repo: str,
        branch: str | None = None,
        private: bool = False,
        endpoint: str | None = None,
        retry: RetryPolicy | None = None,
        xet: bool = False,
        pace: Pace | None = None,
    ) -> None:
        """`private` makes a new repo private. `endpoint` and `retry` default to the library's settings.

        With `xet` large files go through the library's Xet client instead of plain LFS; others at a `pace`. Raises
        HubAccess for a name without an owner.
        """
        from huggingface_hub import HfApi, constants

        if repo.count("/") != 1:
            raise HubAccess(f"{repo!r} cannot be the name of a Hub repo; write org/name")
        self.label = repo if branch in {None, MAIN} else f"{repo}@{branch}"
        self._private, self._xet = private, xet
        policy = retry or RetryPolicy(timeout_s=float(constants.HF_HUB_DOWNLOAD_TIMEOUT))
        self._api = HfApi(endpoint=endpoint, library_name="shardq", library_version=VERSION)
        self._client = HubClient(self._api.endpoint, repo, branch or MAIN, policy)
        self._pace = pace or Pace()
        self._parent: str | None = None

    def prepare(self) -> None:
        """Make repo and branch if they are not there, and find out whether the token may write.

        Remembers the branch's head as the parent of the commit. Raises HubAccess, HubTransfer.
        """
        from huggingface_hub import constants

        client = self._client
        if constants.HF_HUB_OFFLINE:
            raise HubAccess(f"{self.label}: offline (HF_HUB_OFFLINE), nothing can be uploaded; unset it")
        if not client.has_token():
            raise HubAccess(
                f"{self.label}: there is no token to write with; log in with `hf auth login` or set HF_TOKEN"
            )
        if self._is_missing(client.api, "the repo"):
            private = self._private or None  # None: as the owner's settings say
            ask_library(client, lambda: self._api.create_repo(client.repo, private=private, exist_ok=True), "the repo")
        what = f"branch {client.branch}"
        if self._is_missing(f"{client.api}/revision/{client.quoted_branch}", what):
            ask_library(client, lambda: self._api.create_branch(client.repo, branch=client.branch, exist_ok=True), what)
        head = read_head(client)
        if self._private and not head.private:
            raise HubAccess(
                f"{client.repo} is public already, a private repo was asked for; make it private in its settings, "
                "choose another name, or do not ask for a private one"
            )
        probe = StoredFile("", len(_PROBE), hashlib.sha256(_PROBE).hexdigest())
        ask_batch(client, [probe], "the right to write")  # refused to those who may only read
        self._parent = head.commit

    def provenance(self) -> dict[str, Any] | None:
        """shardq.json at the branch's head; None if there is none, or it is no JSON object."""
        snapshot = read_snapshot(self._client, read_head(self._client).commit)
        return read_record(self._client, snapshot.commit) if PROVENANCE in snapshot.entries else None

    def head(self) -> str:
        """The commit at the branch's head. Raises HubAccess, HubTransfer."""
        return read_head(self._client).commit

    def changed_at_s(self) -> float:
        """When the branch's head was made. Raises HubAccess, HubTransfer."""
        return read_date_s(self._client)

    def names(self) -> set[str]:
        """All files at the branch's head. Raises HubAccess, HubTransfer."""
        return set(read_snapshot(self._client, self.head()).entries)

    def holds(self, files: Collection[StoredFile], small: Mapping[str, bytes]) -> bool:
        """True if the branch's head has all these files with this content, whatever else it has."""
        return read_snapshot(self._client, read_head(self._client).commit).holds(files, small)

    def upload(self, path: Path, file: StoredFile, on_bytes: OnBytes) -> None:
        """Store the content of `path`, which must have the size and hash of `file`; see `Destination.upload`.

        Raises HubAccess, HubTransfer, ChecksumMismatch, SourceUnreadable, and what `on_bytes` raises.
        """
        with reading(path):
            size_bytes = path.stat().st_size
        if size_bytes != file.size_bytes:
            raise ChecksumMismatch(
                f"{path} has {size_bytes} bytes, expected {file.size_bytes} as when it was hashed; run again"
            )

        def send(meter: Meter) -> None:
            def send_xet() -> None:
                meter.add(0)  # somebody may have stopped waiting since the last attempt
                upload_xet(self._api, self._client, path, file)

            if self._xet:
                ask_library(self._client, send_xet, f"file {file.name}")
                meter.add(file.size_bytes)
            else:
                upload_content(self._client, file, slowed(file_chunks(path), self._pace), meter)

        run_watched(send, on_bytes, abort_xet if self._xet else None)

    def stored(self, files: Collection[StoredFile]) -> set[str]:
        """Names of the files whose content the Hub has in storage for this repo. Raises HubAccess, HubTransfer."""
        actions = ask_batch(self._client, list(files), "the uploaded files")
        return {f.name for f in files if actions[f.sha256] is None}

    def commit(self, files: Collection[StoredFile], small: Mapping[str, bytes], message: str) -> str:
        """One commit of everything, made exactly once; see `commit_once`. Returns the commit that holds the output.

        Deletes what the shardq.json that is replaced lists and the new output does not have, and nothing else.
        """
        assert self._parent is not None, "prepare comes first"
        check_count(len(files))
        inline = self._inline(small)
        for file in stored_small(small, inline):
            upload_content(self._client, file, bytes_chunks(small[file.name]), Meter())
        return commit_once(self._client, Content(files, small, inline, message), self._parent)

    def check(self, files: int, card: str) -> None:
        """Refuse what the commit would be refused for. Raises HubAccess, HubTransfer."""
        check_count(files)
        self.check_card(card)

    def check_card(self, text: str) -> None:
        """Let the Hub look at the front matter of a README.md: a bad one makes it refuse the commit.

        Raises HubAccess with the Hub's reason, HubTransfer.
        """
        self._client.post_json(
            f"{self._client.endpoint}/api/validate-yaml", "README.md", {"content": text, "repoType": "model"}
        )

    def _is_missing(self, url: str, what: str) -> bool:
        """True if the Hub knows nothing at `url`, or does not tell us."""
        answer = self._client.patiently(lambda: self._client.send("GET", url, what, accepted={401, 404}), what)
        return answer.status_code != 200

    def _inline(self, small: Mapping[str, bytes]) -> set[str]:
        """The small files that the Hub wants in the commit itself; the others belong into storage."""
        modes: dict[str, str] = {}
        names = sorted(small)
        for first in range(0, len(names), _MODES_FILES):
            asked = [
                {
                    "path": name,
                    "sample": base64.b64encode(small[name][:_SAMPLE_BYTES]).decode(),
                    "size": len(small[name]),
                }
                for name in names[first : first + _MODES_FILES]
            ]
            url = f"{self._client.api}/preupload/{self._client.quoted_branch}"
            reply = self._client.post_json(url, "the small files", {"files": asked})
            try:
                modes |= {f["path"]: f["uploadMode"] for f in reply["files"]}
            except (KeyError, TypeError) as error:
                raise HubTransfer(
                    f"{self._client.repo}: the answer about small files is malformed ({error!r}); check HF_ENDPOINT"
                ) from error
        return {name for name in names if modes.get(name) != "lfs" or not small[name]}  # storage takes no empty file


def check_count(files: int) -> None:
    """Refuse an output of more large files than the Hub takes in one commit. Raises HubAccess."""
    if files > MAX_FILES:
        raise HubAccess(
            f"the output has {files} weight files, the Hub takes at most {MAX_FILES} in one commit; write to a folder, "
            "or start from a checkpoint with larger shards"
        )


def ask_library(client: HubClient, call: Callable[[], object], what: str) -> None:
    """Call huggingface_hub with patience, and explain its errors."""

    def attempt() -> None:
        import httpx2
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError

        try:
            call()
        except HfHubHTTPError as error:
            status = error.response.status_code
            if status in RETRY_STATUSES or status >= 500:
                raise PassingError(f"HTTP {status}", server_wait_s(error.response.headers)) from error
            raise explain_hub_error(error, client.repo, client.branch, what) from error
        except httpx2.RequestError as error:
            raise PassingError(f"{type(error).__name__}: {error}") from error
        except HFValidationError as error:
            raise HubAccess(f"{client.repo!r} cannot be the name of a Hub repo; write org/name") from error
        except ValueError as error:
            raise HubTransfer(
                f"{client.repo}: the answer for {what} is not what the Hub sends ({error}); check HF_ENDPOINT"
            ) from error

    client.patiently(attempt, what)
