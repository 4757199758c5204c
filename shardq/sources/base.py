"""What every source offers. Names are relative to the chosen subfolder, with `/` between parts."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Protocol

from shardq.errors import BadOption, SourceUnreadable


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One file of a source."""

    name: str
    size_bytes: int
    sha256: str | None  # when the source knows it without reading the file


class Source(Protocol):
    """A pinned set of files: what it lists and holds does not change while it is used."""

    @property
    def label(self) -> str:
        """Publishable name: "org/name", the folder's own name, or "demo"."""
        ...

    @property
    def commit(self) -> str | None:
        """40 hex digits for the Hub, None elsewhere."""
        ...

    @property
    def remote(self) -> bool:
        """True: `local_path` may say None and shards must be fetched into staging before use."""
        ...

    def files(self) -> tuple[SourceFile, ...]:
        """All files below the chosen subfolder, at any depth, sorted by name."""
        ...

    def read(self, name: str, begin: int, end: int) -> bytes:
        """Exactly the bytes [begin, end) of a file, never fewer."""
        ...

    def local_path(self, name: str) -> Path | None:
        """A readable file that exists already; never to be written to or deleted."""
        ...

    def fetch(self, name: str, target: Path, on_bytes: Callable[[int], None]) -> str | None:
        """Bring a file of a remote source to `target`, whole, verified and durable; returns its sha256 (hex).

        Nothing is at `target` before it is complete. `on_bytes` gets the bytes of each step; a negative number takes
        back bytes that have to be moved again.
        """
        ...


def find_file(files: tuple[SourceFile, ...], name: str, label: str) -> SourceFile:
    """The entry called `name`. Raises SourceUnreadable."""
    for file in files:
        if file.name == name:
            return file
    raise SourceUnreadable(f"{label} has no file {name!r}")


def check_subfolder(subfolder: str | None) -> str | None:
    """A subfolder without needless parts, None for the top. Raises BadOption when it leaves the source."""
    if subfolder is None:
        return None
    parts = PurePosixPath(subfolder).parts
    if ".." in parts or subfolder.startswith("/"):
        raise BadOption(f"subfolder {subfolder!r} must lie inside the source")
    return "/".join(parts) or None
