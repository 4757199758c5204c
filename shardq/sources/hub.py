"""A repo on the Hub, pinned to one commit: huggingface_hub gives listing, addresses and access, hub_transfer the bytes.

huggingface_hub is imported inside functions only, so that importing this module stays light.
"""

import hashlib
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar

from shardq.errors import ChecksumMismatch, HubAccess, HubTransfer
from shardq.files.atomic import explain_os_error, sync_folder, writing
from shardq.sources.base import Source, SourceFile, find_file
from shardq.sources.hub_errors import RETRY_STATUSES, RetryPolicy, explain_hub_error, server_wait_s
from shardq.sources.hub_transfer import FileSink, Link, RangeSink, RemoteFile
from shardq.sources.local import open_folder, read_range
from shardq.version import VERSION

_TRIES_WITH_WRONG_HASH: Final = 2
_Answer = TypeVar("_Answer")


@dataclass(frozen=True, slots=True)
class HubSource:
    """A repo at one commit, and optionally a subfolder of it."""

    label: str
    commit: str
    subfolder: str | None
    listing: tuple[SourceFile, ...]
    endpoint: str
    link: Link
    remote: bool = True

    def files(self) -> tuple[SourceFile, ...]:
        """As listed when the repo was opened, below the subfolder; sha256 for files in large-file storage."""
        return self.listing

    def read(self, name: str, begin: int, end: int) -> bytes:
        """From the user's cache if it is there, else by a range request. A whole file is checked against its hash.

        Raises HubAccess, HubTransfer, ChecksumMismatch.
        """
        cached = self.local_path(name)
        if cached is not None:
            return read_range(cached, begin, end)
        file = find_file(self.listing, name, self.label)
        for _ in range(_TRIES_WITH_WRONG_HASH):
            sink = RangeSink()
            self.link.move(self._remote(file), begin, end, sink)
            whole = begin == 0 and end == file.size_bytes
            if not whole or file.sha256 in {None, hashlib.sha256(sink.data).hexdigest()}:
                return bytes(sink.data)
        raise _mismatch(self.label, file, hashlib.sha256(sink.data).hexdigest())

    def local_path(self, name: str) -> Path | None:
        """The file in the user's Hub cache at this commit, if it has the listed size."""
        from huggingface_hub import try_to_load_from_cache

        path = try_to_load_from_cache(self.label, self._path(name), revision=self.commit)
        if not isinstance(path, str):
            return None
        file = find_file(self.listing, name, self.label)
        try:
            usable = os.access(path, os.R_OK) and os.stat(path).st_size == file.size_bytes
        except OSError:  # a cache that is being cleaned up: fetch instead
            usable = False
        return Path(path) if usable else None

    def fetch(self, name: str, target: Path, on_bytes: Callable[[int], None]) -> str | None:
        """Download to `target` through `target`.part: verified by size and, where the Hub knows it, sha256; fsynced.

        A wrong hash is fetched once more. Raises HubAccess, HubTransfer, ChecksumMismatch, DiskFull, NotWritable; then
        nothing is left behind.
        """
        file = find_file(self.listing, name, self.label)
        part = target.with_name(target.name + ".part")
        with writing(part):
            fd = os.open(part, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
        try:
            sha256 = self._download(file, FileSink(fd, part, on_bytes))
            with writing(target):
                os.fsync(fd)
                os.replace(part, target)
                sync_folder(target.parent)
        finally:
            os.close(fd)
            with suppress(OSError):  # it has its final name, unless something failed
                os.unlink(part)
        return sha256

    def _download(self, file: SourceFile, sink: FileSink) -> str:
        for _ in range(_TRIES_WITH_WRONG_HASH):
            self.link.move(self._remote(file), 0, file.size_bytes, sink)
            found = sink.digest.hexdigest()
            if file.sha256 in {None, found}:
                return found
            sink.restart()
        raise _mismatch(self.label, file, found)

    def _path(self, name: str) -> str:
        return f"{self.subfolder}/{name}" if self.subfolder else name

    def _remote(self, file: SourceFile) -> RemoteFile:
        from huggingface_hub import hf_hub_url

        path = self._path(file.name)
        url = hf_hub_url(self.label, path, revision=self.commit, endpoint=self.endpoint)
        return RemoteFile(self.label, self.commit, path, url, file.size_bytes)


def open_hub(
    repo: str,
    revision: str | None = None,
    subfolder: str | None = None,
    endpoint: str | None = None,
    retry: RetryPolicy | None = None,
) -> Source:
    """List `repo` at `revision` (branch, tag or commit; None: the main branch), resolved to a commit once.

    `endpoint` and `retry` default to the library's settings (HF_ENDPOINT, HF_HUB_DOWNLOAD_TIMEOUT). When the library is
    offline (HF_HUB_OFFLINE) only a snapshot in its cache can be opened. Raises HubAccess, HubTransfer.
    """
    from huggingface_hub import HfApi, RepoFile, constants

    if constants.HF_HUB_OFFLINE:
        return _open_cached(repo, revision, subfolder)
    policy = retry or RetryPolicy(timeout_s=float(constants.HF_HUB_DOWNLOAD_TIMEOUT))
    api = HfApi(endpoint=endpoint, library_name="shardq", library_version=VERSION)
    ask = _Asker(repo, revision, policy)
    info = ask(lambda: api.model_info(repo, revision=revision, timeout=policy.timeout_s), "the repo")
    commit = info.sha
    if commit is None:
        raise HubAccess(f"{repo}: the Hub names no commit for {revision or 'its main branch'}")
    entries = ask(
        lambda: list(api.list_repo_tree(repo, subfolder, recursive=True, revision=commit)),
        f"folder {subfolder}" if subfolder else "the list of files",
    )
    cut = len(subfolder) + 1 if subfolder else 0
    listing = [
        SourceFile(e.path[cut:], e.size, e.lfs.sha256 if e.lfs else None) for e in entries if isinstance(e, RepoFile)
    ]
    listing.sort(key=lambda f: f.name)
    return HubSource(repo, commit, subfolder, tuple(listing), api.endpoint, Link(api.endpoint, policy))


@dataclass(frozen=True, slots=True)
class _Asker:
    """Calls the library's API with patience, and explains its errors."""

    repo: str
    revision: str | None
    retry: RetryPolicy

    def __call__(self, call: Callable[[], _Answer], what: str) -> _Answer:
        import httpx2
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError

        failures = 0
        while True:
            asked_s = None
            try:
                return call()
            except HfHubHTTPError as error:
                if error.response.status_code not in RETRY_STATUSES:
                    raise explain_hub_error(error, self.repo, self.revision, what) from error
                reason = f"HTTP {error.response.status_code}"
                asked_s = server_wait_s(error.response.headers)
            except httpx2.TransportError as error:
                reason = f"{type(error).__name__}: {error}"
            except OSError as error:  # the file with the token
                raise explain_os_error(error, error.filename or "the Hub's settings", writing=False) from error
            except HFValidationError as error:
                raise HubAccess(f"{self.repo!r} cannot be the name of a Hub repo; write org/name") from error
            except ValueError as error:
                raise HubTransfer(
                    f"{self.repo}: the answer for {what} is not what the Hub sends "
                    f"({error}); check HF_ENDPOINT and proxies"
                ) from error
            failures += 1
            self.retry.pause(failures, asked_s, f"{self.repo}, {what}", reason)


def _open_cached(repo: str, revision: str | None, subfolder: str | None) -> Source:
    """A snapshot in the user's cache, without any request."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        snapshot = snapshot_download(repo, revision=revision, local_files_only=True)
    except (LocalEntryNotFoundError, HFValidationError) as error:
        raise HubAccess(
            f"offline (HF_HUB_OFFLINE), and the cache has no complete snapshot of {repo} "
            f"at {revision or 'its main branch'}; go online or give a folder"
        ) from error
    return open_folder(snapshot, subfolder, label=repo, commit=os.path.basename(snapshot))


def _mismatch(label: str, file: SourceFile, found: str) -> ChecksumMismatch:
    return ChecksumMismatch(
        f"{label}, file {file.name}: sha256 is {found}, the Hub promises {file.sha256}, "
        f"{_TRIES_WITH_WRONG_HASH} times in a row; try another network, or report it to the owner of the repo"
    )
