"""Where checkpoints come from: a folder, the Hub, or the built-in demo model."""

import os
import re
from typing import TYPE_CHECKING, Final

from shardq.errors import BadOption, SourceUnreadable
from shardq.sources.base import FileReader, Source, SourceFile, check_subfolder
from shardq.sources.local import open_folder

if TYPE_CHECKING:
    from shardq.pace import Pace
    from shardq.sources.hub_xet import XetOptions

__all__ = ["FileReader", "Source", "SourceFile", "names_a_repo", "open_source"]

_HUB_SCHEME: Final = "hf://"
_NAME: Final = r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?"
_REPO: Final = re.compile(rf"{_NAME}/{_NAME}")
_SCHEME: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


def open_source(
    text: str,
    subfolder: str | None = None,
    revision: str | None = None,
    xet: "XetOptions | None" = None,
    pace: "Pace | None" = None,
) -> Source:
    """The source that `text` names: a folder, `org/name[@revision]`, `hf://org/name[@revision]` or `demo`.

    A folder that exists wins over anything else with that name. `subfolder` is inside the folder or repo. The Hub is
    asked once to pin the revision; `xet` says how to fetch its files through hf_xet, `pace` how fast otherwise, and
    both nothing elsewhere. Raises
    SourceUnreadable (no such thing), BadOption (contradicting options), HubAccess, HubTransfer.
    """
    inside = check_subfolder(subfolder)
    if not text.startswith(_HUB_SCHEME) and os.path.lexists(os.path.expanduser(text)):
        if revision is not None:
            raise BadOption(f"{text} is a folder and has no revisions; leave --revision out")
        return open_folder(os.path.expanduser(text), inside)
    if text == "demo":
        if revision is not None or inside:
            raise BadOption("the demo model has neither revisions nor subfolders")
        from shardq.sources.demo import open_demo  # brings numpy

        return open_demo()
    repo, at, pinned = text.removeprefix(_HUB_SCHEME).partition("@")
    if not names_a_repo(repo):
        raise SourceUnreadable(_neither(text))
    if at and not pinned:
        raise SourceUnreadable(f"{text!r} ends in '@' without a revision; write {repo} or {repo}@REVISION")
    if at and revision is not None and revision != pinned:
        raise BadOption(f"two revisions for {repo}: {pinned!r} and {revision!r}; give one")
    from shardq.sources.hub import open_hub  # brings an HTTP client

    return open_hub(repo, revision=pinned or revision, subfolder=inside, xet=xet, pace=pace)


def names_a_repo(text: str) -> bool:
    """True for org/name, which no path is that begins with a dot, a slash or a tilde."""
    return _REPO.fullmatch(text) is not None


def _neither(text: str) -> str:
    if text.startswith(("/", ".", "~")):
        return f"no folder {text}: check the path (a Hub repo is written org/name)"
    if _SCHEME.match(text) and not text.startswith(_HUB_SCHEME):
        return f"{text!r} is a URL of a kind that is not read; give a folder, org/name[@revision] or 'demo'"
    return (
        f"{text!r} is neither a folder here nor a Hub repo; "
        "give an existing folder, org/name[@revision], hf://org/name[@revision] or 'demo'"
    )
