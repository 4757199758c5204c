"""Uploads through the library's Xet client, which finds out itself which parts of a file the Hub has already."""

from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from shardq.destinations.base import StoredFile
from shardq.destinations.hub_client import HubClient, PassingError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from huggingface_hub import HfApi


def upload_xet(api: "HfApi", client: HubClient, path: Path, file: StoredFile) -> None:
    """Store the content of `path`; the hash is given, so the file is read once. Raises PassingError.

    The library's own HTTP errors pass as they are. Without hf_xet, or with HF_HUB_DISABLE_XET, the library
    takes plain LFS.
    """
    from huggingface_hub import CommitOperationAdd
    from huggingface_hub.errors import HfHubHTTPError

    operation = CommitOperationAdd(file.name, path)  # reads the first bytes only
    operation.upload_info.sha256 = bytes.fromhex(file.sha256)
    operation._upload_mode = "lfs"  # else a small one is left for the commit itself
    try:
        with _without_bars():
            api.preupload_lfs_files(client.repo, [operation], revision=client.branch, free_memory=False, num_threads=1)
    except HfHubHTTPError:
        raise
    except (RuntimeError, OSError, ValueError) as error:  # what hf_xet raises for anything on its way
        raise PassingError(f"Xet: {error}") from error


@contextmanager
def _without_bars() -> "Iterator[None]":
    """The library would draw its own bars over ours; a user who has set them by HF_HUB_DISABLE_PROGRESS_BARS wins."""
    from huggingface_hub import constants
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    shown = constants.HF_HUB_DISABLE_PROGRESS_BARS is None and not are_progress_bars_disabled()
    if shown:
        disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            enable_progress_bars()


def abort_xet() -> None:
    """Stop the transfers that run in this process; the next one begins a new session."""
    from huggingface_hub.utils import _xet

    abort: Callable[[], None] = _xet.abort_xet_session
    abort()
