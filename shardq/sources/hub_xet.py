"""Downloads through hf_xet (`--xet`): chunks from many places at once, within a budget of memory.

hf_xet neither resumes nor compares a hash of the whole file, and costs several times the CPU time of the plain way. It
is imported inside functions only.
"""

import hashlib
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Final

from shardq.errors import BadOption, HubTransfer
from shardq.files.atomic import reading

LEAST_BUFFER_BYTES: Final = 128 << 20
_BLOCK_BYTES: Final = 64 << 20  # the most that one of hf_xet's requests brings
_POLL_S: Final = 0.1
_PIECE_BYTES: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class XetOptions:
    """What the library of the storage may take."""

    buffer_bytes: int  # of memory, over all files at a time


@dataclass(frozen=True, slots=True)
class XetFiles:
    """The files of a repo that are in Xet storage, and the session that gets them."""

    session: Any
    token_url: str
    headers: Callable[[], dict[str, str]]  # for token_url, with the token
    hashes: Mapping[str, str]  # by name in the repo

    def download(self, name: str, what: str, size_bytes: int, out: Path, on_bytes: Callable[[int], None]) -> None:
        """Write a file to `out`, reporting to `on_bytes` as Source.fetch says. Raises HubTransfer."""
        info = import_module("hf_xet").XetFileInfo(self.hashes[name], size_bytes)  # it has no types
        reported = 0
        try:
            group = self.session.new_file_download_group(
                token_refresh_url=self.token_url, token_refresh_headers=self.headers()
            )
            task = group.start_download_file(info, os.path.abspath(out))
        except (OSError, RuntimeError, ValueError) as error:
            raise _explain(what, error) from error
        with ThreadPoolExecutor(1) as waiter:  # nothing is known to be complete before this call returns
            ended = waiter.submit(group.wait_to_finish)
            try:
                while not wait([ended], _POLL_S).done:
                    progress = task.progress()
                    fresh = min(progress.bytes_completed, size_bytes) - reported if progress else 0
                    reported += fresh
                    on_bytes(fresh)
            except BaseException:
                group.abort()
                raise
        try:
            ended.result()
        except (OSError, RuntimeError, ValueError) as error:
            raise _explain(what, error) from error
        on_bytes(size_bytes - reported)


def open_xet(
    options: XetOptions, token_url: str, headers: Callable[[], dict[str, str]], hashes: Mapping[str, str]
) -> XetFiles:
    """A session with its own settings; the environment's HF_XET_* are overruled. Raises BadOption."""
    if options.buffer_bytes < LEAST_BUFFER_BYTES:
        raise BadOption(
            f"--xet needs {LEAST_BUFFER_BYTES >> 20} MiB of memory for its buffers, {options.buffer_bytes >> 20} MiB "
            "are left; raise --max-memory or leave --xet out"
        )
    try:
        hf_xet = import_module("hf_xet")
    except ImportError as error:
        raise BadOption("--xet needs the package hf_xet; install it or leave --xet out") from error
    session = hf_xet.XetSession(hf_xet.XetConfig().with_config(xet_settings(options)))
    return XetFiles(session, token_url, headers, hashes)


def xet_settings(options: XetOptions) -> dict[str, Any]:
    """hf_xet's settings for a budget: requests in flight take one half, what waits for its turn the other."""
    half = options.buffer_bytes // 2
    requests = max(1, min(64, half // _BLOCK_BYTES))
    return {
        "reconstruction.download_buffer_size": half // 2,
        "reconstruction.download_buffer_perfile_size": half // 4,
        "reconstruction.download_buffer_limit": half,
        "reconstruction.min_prefetch_buffer": half // 4,
        "client.ac_max_download_concurrency": requests,
        "client.ac_initial_download_concurrency": min(4, requests),
    }


def hash_file(path: Path, tick: Callable[[], None]) -> str:
    """sha256 (hex) of a file, calling `tick` on the way. Raises SourceUnreadable."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(_PIECE_BYTES))
    with reading(path), open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            tick()
    return digest.hexdigest()


def _explain(what: str, error: Exception) -> HubTransfer:
    reason = " ".join(str(error).split())[:300]
    return HubTransfer(f"{what}: hf_xet gave up ({reason}); run the same command again, or leave --xet out")
