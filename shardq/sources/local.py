"""A folder on this machine. It is read in place and never written to."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from shardq.errors import SourceUnreadable
from shardq.files.atomic import explain_os_error, pread_exact, reading
from shardq.sources.base import FileReader, SourceFile

_PIECE_BYTES: Final = 8 << 20  # a slow disk reports, and can be stopped, after each


@dataclass(frozen=True, slots=True)
class FolderSource:
    """A folder, or a snapshot in the Hub cache (then with the repo's name and commit)."""

    root: Path
    label: str
    commit: str | None
    listing: tuple[SourceFile, ...]
    remote: bool = False

    def files(self) -> tuple[SourceFile, ...]:
        """As listed when the folder was opened."""
        return self.listing

    def read(self, name: str, begin: int, end: int) -> bytes:
        """Raises SourceUnreadable, and CorruptShard when the file is shorter than `end`."""
        return read_range(self.root / name, begin, end)

    def local_path(self, name: str) -> Path | None:
        """The file itself."""
        path = self.root / name
        return path if path.is_file() else None

    def fetch(self, name: str, target: Path, on_bytes: Callable[[int], None]) -> str | None:
        """Not for folders: their files are used in place."""
        del on_bytes
        raise AssertionError(f"{name} is in a local folder; nothing to fetch to {target}")

    def open_file(self, name: str, on_bytes: Callable[[int], None]) -> FileReader:
        """Raises SourceUnreadable."""
        return open_local(self.root / name, on_bytes)


class LocalReader:
    """Reads a file through one descriptor."""

    def __init__(self, fd: int, name: str, on_bytes: Callable[[int], None]) -> None:
        self._fd = fd
        self._name = name
        self._on_bytes = on_bytes

    def read_into(self, begin: int, out: memoryview) -> None:
        """Raises SourceUnreadable, and CorruptShard past the end of the file."""
        bytes_ = out.cast("B")
        for at in range(0, len(bytes_), _PIECE_BYTES):
            piece = bytes_[at : at + _PIECE_BYTES]
            pread_exact(self._fd, piece, begin + at, self._name)
            self._on_bytes(len(piece))

    def close(self) -> None:
        """Close the descriptor."""
        os.close(self._fd)


def open_local(path: Path, on_bytes: Callable[[int], None]) -> LocalReader:
    """A reader of a file on this machine. Raises SourceUnreadable."""
    with reading(path):
        return LocalReader(os.open(path, os.O_RDONLY | os.O_CLOEXEC), path.name, on_bytes)


def read_range(path: Path, begin: int, end: int) -> bytes:
    """The bytes [begin, end) of a file. Raises SourceUnreadable, and CorruptShard past its end."""
    out = bytearray(end - begin)
    with reading(path):
        fd = os.open(path, os.O_RDONLY)
        try:
            pread_exact(fd, memoryview(out), begin, path.name)
        finally:
            os.close(fd)
    return bytes(out)


def open_folder(
    folder: str, subfolder: str | None = None, label: str | None = None, commit: str | None = None
) -> FolderSource:
    """List a folder. Symbolic links to files count as files; folders whose name begins with a dot (version control,
    caches, staging) are left out. `label` is by default the folder's own name.

    A GGUF file counts as a folder of the files of its model. Raises SourceUnreadable: missing, no folder, or not
    readable.
    """
    root = Path(os.path.abspath(folder))
    chosen = root / subfolder if subfolder else root
    with reading(chosen):
        if not chosen.is_dir():
            if chosen.suffix == ".gguf" and chosen.is_file():
                return _open_file(chosen)
            if chosen.exists():
                raise SourceUnreadable(f"{chosen} is a file; give the folder that holds the checkpoint")
            raise SourceUnreadable(f"no folder {chosen}: check the path")
        return FolderSource(chosen, label or root.name or "root", commit, _list(chosen))


def _open_file(path: Path) -> FolderSource:
    """A GGUF file as a source, with the other parts of its model if it is one."""
    from shardq.gguf.headers import find_models

    beside = [SourceFile(p.name, p.stat().st_size, None) for p in sorted(path.parent.iterdir()) if p.is_file()]
    (model,) = (m for m in find_models(beside) if path.name in {f.name for f in m.files})
    return FolderSource(path.parent, path.name, None, model.files)


def _list(root: Path) -> tuple[SourceFile, ...]:
    found: list[SourceFile] = []
    for folder, subfolders, names in os.walk(root, onerror=_refuse):
        subfolders[:] = [d for d in subfolders if not d.startswith(".")]
        for name in names:
            path = Path(folder, name)
            if path.is_file():  # no sockets, pipes or dangling links
                relative = path.relative_to(root).as_posix()
                found.append(SourceFile(relative, path.stat().st_size, None))
    return tuple(sorted(found, key=lambda f: f.name))


def _refuse(error: OSError) -> None:
    raise explain_os_error(error, error.filename or "the folder", writing=False) from error
