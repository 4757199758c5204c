"""Where an output goes when it does not go to a folder: a branch of a Hub repo."""

from typing import TYPE_CHECKING, Final

from shardq.destinations.base import Destination, StoredFile
from shardq.errors import BadOption

if TYPE_CHECKING:
    from shardq.pace import Pace

__all__ = ["Destination", "StoredFile", "open_destination"]

_HUB_SCHEME: Final = "hf://"


def open_destination(text: str, private: bool = False, xet: bool = False, pace: "Pace | None" = None) -> Destination:
    """The destination that `text` names: `org/name[@branch]` or `hf://org/name[@branch]`. Nothing is asked yet.

    `private` makes a repo that is new a private one; with `xet` the library's Xet client carries large files, others go
    at a `pace`. Raises BadOption for a name without a branch behind its '@', HubAccess for one without an owner.
    """
    repo, at, branch = text.removeprefix(_HUB_SCHEME).partition("@")
    if at and not branch:
        raise BadOption(f"{text!r} ends in '@' without a branch; write {repo} or {repo}@BRANCH")
    from shardq.destinations.hub import HubDestination  # brings an HTTP client

    return HubDestination(repo, branch or None, private, xet=xet, pace=pace)
