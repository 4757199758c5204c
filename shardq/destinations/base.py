"""What a place is that takes an output which is not a folder: files arrive one by one, all appear at once."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

OnBytes = Callable[[int], None]  # bytes stored since the last call; negative when a file has to begin again


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A large file of the output. Its content is known by its hash, its local copy may be gone."""

    name: str  # path in the output, with forward slashes
    size_bytes: int
    sha256: str  # 64 hex digits


class Storage(Protocol):
    """What takes single files. Calls may raise HubAccess and HubTransfer."""

    def upload(self, path: Path, file: StoredFile, on_bytes: OnBytes) -> None:
        """Store the content of a large file; nobody sees it before it is published.

        Content that is stored already is not sent. `on_bytes` is called at least twice a second, if only with 0, from
        the caller's thread; what it raises ends the upload. Raises ChecksumMismatch when the content is refused.
        """
        ...


class Destination(Storage, Protocol):
    """Where an output is published."""

    @property
    def label(self) -> str:
        """What the user calls it: org/name, or org/name@branch."""
        ...

    def prepare(self) -> None:
        """Before the first weight: make the place, and find out whether it may be written."""
        ...

    def check(self, files: int, card: str) -> None:
        """Before the first weight: would an output of so many files, with such a README.md, be taken?"""
        ...

    def provenance(self) -> dict[str, Any] | None:
        """shardq.json as it is there now; None without a readable one."""
        ...

    def head(self) -> str:
        """The commit that is there now."""
        ...

    def changed_at_s(self) -> float:
        """When that commit was made, in seconds since 1970."""
        ...

    def names(self) -> set[str]:
        """All files that are there now."""
        ...

    def holds(self, files: Collection[StoredFile], small: Mapping[str, bytes]) -> bool:
        """True if all these files are there now, with this content. Others may be there too."""
        ...

    def stored(self, files: Collection[StoredFile]) -> set[str]:
        """Names of the files whose content is stored now; unpublished content may be dropped after a while."""
        ...

    def commit(self, files: Collection[StoredFile], small: Mapping[str, bytes], message: str) -> str:
        """Publish everything at once; returns the hash of the commit that holds it.

        `files` must be stored, `small` comes with the call. What an earlier output has and this one has not goes away.
        """
        ...
