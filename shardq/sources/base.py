"""What every source offers. Names are relative to the chosen subfolder, with `/` between parts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Final, Protocol, TypeVar

from shardq.errors import BadOption, CorruptShard, SourceUnreadable

REMOTE_READERS: Final = 8
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One file of a source."""

    name: str
    size_bytes: int
    sha256: str | None  # when the source knows it without reading the file


class FileReader(Protocol):
    """Reads parts of one file, for one thread at a time."""

    def read_into(self, begin: int, out: memoryview) -> None:
        """Fill `out` (writable bytes, C-contiguous) from byte `begin` of the file on; what fails in passing is retried.

        Raises CorruptShard past the end of the file, SourceUnreadable, HubAccess, HubTransfer.
        """
        ...

    def close(self) -> None:
        """Let go of the file."""
        ...


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

        Nothing is at `target` before it is complete. What has arrived when a call fails or is killed is kept beside it
        and taken up by the next call. `on_bytes` gets the bytes of each step, those taken up included; a negative
        number takes back bytes that have to be moved again; 0 comes at least twice a second while nothing arrives.
        Whatever it raises ends the call.
        """
        ...

    def open_file(self, name: str, on_bytes: Callable[[int], None]) -> FileReader:
        """A reader of parts of a file; `on_bytes` as for `fetch`. Several threads open a reader each."""
        ...


def find_file(files: tuple[SourceFile, ...], name: str, label: str) -> SourceFile:
    """The entry called `name`. Raises SourceUnreadable."""
    for file in files:
        if file.name == name:
            return file
    raise SourceUnreadable(f"{label} has no file {name!r}")


def read_each(source: Source, files: Sequence[SourceFile], read: Callable[[Source, SourceFile], T]) -> dict[str, T]:
    """What `read` makes of each of `files`, in their order; those on the network are read side by side. Raises what it
    raises; what has not begun then is not read."""
    if not source.remote:
        return {f.name: read(source, f) for f in files}
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(REMOTE_READERS) as pool:
        futures = [(f.name, pool.submit(read, source, f)) for f in files]
        try:
            return {name: future.result() for name, future in futures}
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def check_subfolder(subfolder: str | None) -> str | None:
    """A subfolder without needless parts, None for the top. Raises BadOption when it leaves the source."""
    if subfolder is None:
        return None
    parts = PurePosixPath(subfolder).parts
    if ".." in parts or subfolder.startswith("/"):
        raise BadOption(f"subfolder {subfolder!r} must lie inside the source")
    return "/".join(parts) or None


def check_part(name: str, begin: int, count: int, size_bytes: int) -> None:
    """Raises CorruptShard when a file of `size_bytes` has no `count` bytes from `begin` on."""
    if begin < 0 or begin + count > size_bytes:
        raise CorruptShard(
            f"{name} has {size_bytes} bytes, but bytes {begin} to {begin + count} are asked for; get the file again"
        )
