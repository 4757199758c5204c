"""A repo on the Hub, pinned to one commit: huggingface_hub gives listing, addresses and access, hub_transfer the bytes.

huggingface_hub is imported inside functions only, so that importing this module stays light.
"""

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar

from shardq.errors import ChecksumMismatch, HubAccess, HubTransfer
from shardq.files.atomic import explain_os_error, sync_folder, writing
from shardq.pace import Pace, ignore_tick, sleep_ticking
from shardq.sources.base import FileReader, Source, SourceFile, check_part, find_file
from shardq.sources.hub_errors import (
    RETRY_STATUSES,
    Gate,
    RetryPolicy,
    explain_hub_error,
    server_wait_s,
)
from shardq.sources.hub_parts import bad_path, keep_part, part_path, remove_leftovers, reserve, xet_path
from shardq.sources.hub_sinks import FileSink, MemorySink
from shardq.sources.hub_transfer import Link, RemoteFile, Transfer, token_header
from shardq.sources.hub_xet import XetFiles, XetOptions, hash_file, open_xet
from shardq.sources.local import open_folder, open_local, read_range
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
    xet: XetFiles | None = None
    remote: bool = True

    def files(self) -> tuple[SourceFile, ...]:
        """As listed when the repo was opened, below the subfolder; sha256 for files in large-file storage."""
        return self.listing

    def read(self, name: str, begin: int, end: int) -> bytes:
        """From the user's cache if it is there, else by a range request. A whole file is checked against its hash.

        Raises HubAccess, HubTransfer, ChecksumMismatch, CorruptShard.
        """
        cached = self.local_path(name)
        if cached is not None:
            return read_range(cached, begin, end)
        file = find_file(self.listing, name, self.label)
        check_part(name, begin, end - begin, file.size_bytes)
        out = bytearray(end - begin)
        for _ in range(_TRIES_WITH_WRONG_HASH):
            self._transfer(file).move(begin, end, MemorySink(memoryview(out), ignore_bytes))
            whole = begin == 0 and end == file.size_bytes
            if not whole or file.sha256 in {None, hashlib.sha256(out).hexdigest()}:
                return bytes(out)
        raise ChecksumMismatch(_mismatch(self.label, file, hashlib.sha256(out).hexdigest()))

    def open_file(self, name: str, on_bytes: Callable[[int], None]) -> FileReader:
        """Reads the user's cache if the file is there, else by range requests to the storage address that is resolved
        once for all of them. Raises SourceUnreadable."""
        cached = self.local_path(name)
        if cached is not None:
            return open_local(cached, on_bytes)
        file = find_file(self.listing, name, self.label)
        return HubReader(file, self._transfer(file), on_bytes)

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
        """Download to `target` through a part file beside it: verified by size and, where the Hub knows it, sha256;
        fsynced.

        The part file is named for the content that is fetched, and kept when the call fails; a part of other content is
        deleted. A wrong hash is fetched once more, then set aside as `target`.bad until the next call.
        Raises HubAccess, HubTransfer, ChecksumMismatch, DiskFull, NotWritable.
        """
        file = find_file(self.listing, name, self.label)
        if self.xet is not None and self._path(name) in self.xet.hashes:
            return self._fetch_by_xet(self.xet, file, target, on_bytes)
        part = part_path(target, file.sha256 or _sha256_of(f"{self.commit}:{file.name}:{file.size_bytes}"))
        remove_leftovers(target, part)
        with writing(part):
            fd = os.open(part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        sink = FileSink(fd, part, on_bytes, self.link.hashes)
        try:
            reserve(fd, file.size_bytes, part)
            with self.link.hashes.joined():
                sha256 = self._download(file, target, part, sink)
            with writing(target):
                os.fsync(fd)
                os.replace(part, target)
                sync_folder(target.parent)
        finally:
            keep_part(sink, part, fd)
        return sha256

    def _download(self, file: SourceFile, target: Path, part: Path, sink: FileSink) -> str:
        sink.resume(file.size_bytes)
        fresh = 0  # downloads from the first byte on; a part that was taken up proves nothing
        while True:
            fresh += sink.size_bytes == 0
            self._transfer(file).move(0, file.size_bytes, sink)
            found = sink.digest.hexdigest()
            if file.sha256 in {None, found}:
                return found
            if fresh == _TRIES_WITH_WRONG_HASH:
                bad = bad_path(target)
                with writing(bad):
                    os.replace(part, bad)
                raise ChecksumMismatch(f"{_mismatch(self.label, file, found)}; what came is kept as {bad.name}")
            sink.restart()

    def _fetch_by_xet(
        self, xet: XetFiles, file: SourceFile, target: Path, on_bytes: Callable[[int], None]
    ) -> str | None:
        """hf_xet cannot resume: its part file is always begun anew. The hash is that of the file on the disk."""
        part = xet_path(target)
        remove_leftovers(target, part)
        path, what = self._path(file.name), f"{self.label}, file {file.name}"
        for left in reversed(range(_TRIES_WITH_WRONG_HASH)):
            xet.download(path, what, file.size_bytes, part, on_bytes)
            found = hash_file(part, lambda: on_bytes(0))
            if file.sha256 in {None, found}:
                break
            if left == 0:
                with writing(part):
                    os.replace(part, bad_path(target))
                raise ChecksumMismatch(f"{_mismatch(self.label, file, found)}; kept as {bad_path(target).name}")
            on_bytes(-file.size_bytes)
        with writing(target):
            fd = os.open(part, os.O_RDONLY)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
            os.replace(part, target)
            sync_folder(target.parent)
        return found

    def _path(self, name: str) -> str:
        return f"{self.subfolder}/{name}" if self.subfolder else name

    def _transfer(self, file: SourceFile) -> Transfer:
        from huggingface_hub import hf_hub_url

        path = self._path(file.name)
        url = hf_hub_url(self.label, path, revision=self.commit, endpoint=self.endpoint)
        return Transfer(self.link, RemoteFile(self.label, self.commit, path, url, file.size_bytes))


class HubReader:
    """Reads parts of one file of a repo."""

    def __init__(self, file: SourceFile, transfer: Transfer, on_bytes: Callable[[int], None]) -> None:
        self._file = file
        self._transfer = transfer
        self._on_bytes = on_bytes

    def read_into(self, begin: int, out: memoryview) -> None:
        """Raises HubAccess, HubTransfer, and CorruptShard past the end of the file."""
        check_part(self._file.name, begin, out.nbytes, self._file.size_bytes)
        self._transfer.move(begin, begin + out.nbytes, MemorySink(out.cast("B"), self._on_bytes))

    def close(self) -> None:
        """Nothing to let go of: connections are the link's."""


def open_hub(
    repo: str,
    revision: str | None = None,
    subfolder: str | None = None,
    endpoint: str | None = None,
    retry: RetryPolicy | None = None,
    xet: XetOptions | None = None,
    pace: Pace | None = None,
) -> Source:
    """List `repo` at `revision` (branch, tag or commit; None: the main branch), resolved to a commit once.

    `endpoint` and `retry` default to the library's settings (HF_ENDPOINT, HF_HUB_DOWNLOAD_TIMEOUT). When the library is
    offline (HF_HUB_OFFLINE) only a snapshot in its cache can be opened. `xet`: fetch what is in Xet storage through
    hf_xet; `pace`: of all other files. Raises HubAccess, HubTransfer, BadOption.
    """
    from huggingface_hub import HfApi, RepoFile, constants

    if constants.HF_HUB_OFFLINE:
        return _open_cached(repo, revision, subfolder)
    policy = retry or RetryPolicy(timeout_s=float(constants.HF_HUB_DOWNLOAD_TIMEOUT))
    api = HfApi(endpoint=endpoint, library_name="shardq", library_version=VERSION)
    link = Link(api.endpoint, policy, pace)
    ask = _Asker(repo, revision, policy, link.gate)
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
    files = None
    if xet is not None:
        hashes = {e.path: e.xet_hash for e in entries if isinstance(e, RepoFile) and e.xet_hash}
        token_url = f"{api.endpoint}/api/models/{repo}/xet-read-token/{commit}"
        files = open_xet(xet, token_url, token_header, hashes)
    return HubSource(repo, commit, subfolder, tuple(listing), api.endpoint, link, files)


@dataclass(frozen=True, slots=True)
class _Asker:
    """Calls the library's API with patience, and explains its errors."""

    repo: str
    revision: str | None
    retry: RetryPolicy
    gate: Gate

    def __call__(self, call: Callable[[], _Answer], what: str) -> _Answer:
        import httpx2
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError

        failures = 0
        while True:
            asked_s = None
            self.gate.wait(ignore_tick)
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
            wait_s = self.retry.next_wait_s(failures, asked_s, f"{self.repo}, {what}", reason)
            if reason == "HTTP 429":
                self.gate.hold(wait_s)
            else:
                sleep_ticking(wait_s, ignore_tick)


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


def _mismatch(label: str, file: SourceFile, found: str) -> str:
    return (
        f"{label}, file {file.name}: sha256 is {found}, the Hub promises {file.sha256}, "
        f"{_TRIES_WITH_WRONG_HASH} times in a row; try another network, or report it to the owner of the repo"
    )


def _sha256_of(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def ignore_bytes(count: int) -> None:
    """For those who need no progress."""
    del count
