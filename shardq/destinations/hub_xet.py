"""Uploads through the library's Xet client, which finds out itself which parts of a file the Hub has already."""

from pathlib import Path
from typing import TYPE_CHECKING

from shardq.destinations.base import StoredFile
from shardq.destinations.hub_client import HubClient, PassingError

if TYPE_CHECKING:
    from collections.abc import Callable

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
        api.preupload_lfs_files(client.repo, [operation], revision=client.branch, free_memory=False, num_threads=1)
    except HfHubHTTPError:
        raise
    except (RuntimeError, OSError, ValueError) as error:  # what hf_xet raises for anything on its way
        raise PassingError(f"Xet: {error}") from error


def abort_xet() -> None:
    """Stop the transfers that run in this process; the next one begins a new session."""
    from huggingface_hub.utils import _xet

    abort: Callable[[], None] = _xet.abort_xet_session
    abort()
