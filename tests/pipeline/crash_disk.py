"""What a power cut would leave of a folder, when the system does no more than POSIX promises.

A kill loses nothing that was written, so no kill shows a missing fsync. `Disk` follows every change of names and every
fsync below a folder; `cut` then puts the folder into a state that a disk may be in after the power went:

    undone    nothing that was not made durable has happened; files hold what they held at their last fsync
    removed   as undone, but names that were removed are gone
    done      all names are as the processes saw them, and bytes that were not made durable are zeros
    mixed     any of that for each name and file, by chance

Made durable means: content by an fsync of the file, a name by an fsync of its folder. A rename is the exception to any
name being there or not: it never loses the file, which keeps its old name until it has the new one.
"""

import os
import pickle
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

CUTS: Final = ("undone", "removed", "done", "mixed")
ROOT: Final = 0
PAGE_BYTES: Final = 4096
Entry = tuple[int, str]  # folder, name in it

# A sweep replaces these in `os`.
_open, _close, _read, _fstat = os.open, os.close, os.read, os.fstat
_unlink, _rmdir, _mkdir, _utime = os.unlink, os.rmdir, os.mkdir, os.utime


@dataclass(frozen=True, slots=True)
class Change:
    """A name that was given (`node`) or taken away (None) and is not durable yet."""

    entry: Entry
    node: int | None
    new_name: "Change | None" = None  # of a name that a rename took away


class Disk:
    """The files below `root`: as processes see them (that is what is there), and as they are on the disk."""

    def __init__(self, root: Path) -> None:
        """Everything that is there now is durable."""
        self.root = root
        self._nodes = ROOT
        self._names: dict[Entry, int] = {}
        self._folders = {ROOT}
        self._synced: dict[int, bytes] = {}  # content on the disk
        self._unnamed: dict[int, tuple[bytes, int]] = {}  # content and time of files whose name is gone
        self._again: dict[int, set[int]] = {}  # pages written again since an fsync of the file failed
        self._scan(root, ROOT)
        self._durable = dict(self._names)
        self._changes: list[Change] = []

    @classmethod
    def load(cls, path: Path, root: Path) -> Self:
        """The disk that the last process left; what it had not made durable still is not."""
        if not path.exists():
            return cls(root)
        disk: Self = pickle.loads(path.read_bytes())
        return disk

    def save(self, path: Path) -> None:
        """For `load`. Goes through none of the calls that a sweep replaces."""
        with path.open("wb") as f:
            pickle.dump(self, f)

    # --- what happens ------------------------------------------------------------------------------------------------

    def node(self, path: str) -> int | None:
        """The file or folder at a path, None if there is none."""
        node: int | None = ROOT
        for part in path.removeprefix(str(self.root)).split("/")[1:]:
            node = None if node is None else self._names.get((node, part))
        return node

    def created(self, path: str, folder: bool) -> int:
        """A new file, still empty, or a new folder."""
        self._nodes += 1
        if folder:
            self._folders.add(self._nodes)
        else:
            self._synced[self._nodes] = b""
        self._name(Change(self._entry(path), self._nodes))
        return self._nodes

    def removing(self, path: str) -> None:
        """Call before a name is taken away, by unlink, by rmdir or by a rename to it."""
        node = self.node(path)
        if node is not None and node not in self._folders:
            self._unnamed[node] = _content(path)

    def removed(self, path: str) -> None:
        """Call afterwards."""
        self._name(Change(self._entry(path), None))

    def renamed(self, old: str, new: str) -> None:
        """Call `removing(new)` before."""
        given = Change(self._entry(new), self.node(old))
        self._name(given)
        self._name(Change(self._entry(old), None, given))

    def synced(self, node: int) -> None:
        """fsync of a file: its content is durable. Of a folder: the names in it are."""
        if node in self._folders:
            for change in [c for c in self._changes if c.entry[0] == node]:
                self._apply(change)
            return
        for path in (p for p, n in self._paths(self._names).items() if n == node):  # none once it is deleted
            self._synced[node] = self._reached(node, _content(path)[0])

    def failed(self, node: int | None) -> None:
        """An fsync failed."""
        if node is not None and node not in self._folders:
            self._again[node] = set()

    def wrote(self, node: int | None, offset: int, size_bytes: int) -> None:
        """Call after each write."""
        if node in self._again and size_bytes:
            pages = range(offset // PAGE_BYTES, (offset + size_bytes - 1) // PAGE_BYTES + 1)
            self._again[node].update(pages)

    def _reached(self, node: int, content: bytes) -> bytes:
        """What an fsync makes durable of a content."""
        if node not in self._again:
            return content
        reached = bytearray(self._synced[node][: len(content)].ljust(len(content), b"\0"))
        for page in self._again[node]:
            at = page * PAGE_BYTES
            reached[at : at + PAGE_BYTES] = content[at : at + PAGE_BYTES]
        return bytes(reached)

    # --- the end -----------------------------------------------------------------------------------------------------

    def cut(self, kind: str, chance: random.Random) -> None:
        """The power goes. `kind` is one of CUTS."""
        for change in list(self._changes):
            removal = change.node is None and change.new_name is None
            if {"undone": False, "removed": removal, "done": True, "mixed": chance.random() < 0.5}[kind]:
                self._apply(change)
        now, after = self._paths(self._names), self._paths(self._durable)
        path_of = {node: path for path, node in now.items()}
        seen = {node: self._unnamed[node] if node in self._unnamed else _content(path_of[node])
                for node in after.values() if node not in self._folders}  # fmt: skip
        left = {node: self._left(node, kind, content, chance) for node, (content, _) in seen.items()}
        for path, node in sorted(now.items(), reverse=True):  # what is in a folder before the folder
            if after.get(path) != node:
                (_rmdir if node in self._folders else _unlink)(path)
        for path, node in sorted(after.items()):
            if node in self._folders:
                if now.get(path) != node:
                    _mkdir(path)
            elif now.get(path) != node or left[node] != seen[node][0]:
                Path(path).write_bytes(left[node])
                _utime(path, ns=(seen[node][1], seen[node][1]))

    def _left(self, node: int, kind: str, content: bytes, chance: random.Random) -> bytes:
        """What remains of a file's content."""
        synced = self._synced[node]
        zeros = synced[: len(content)].ljust(len(content), b"\0")
        half = len(content) // 2
        choices = {"undone": [synced], "removed": [synced], "done": [zeros]}
        return chance.choice(choices.get(kind, [synced, zeros, content, content[:half] + zeros[half:]]))

    # --- names -------------------------------------------------------------------------------------------------------

    def _name(self, change: Change) -> None:
        _set(self._names, change)
        self._changes.append(change)

    def _apply(self, change: Change) -> None:
        if change not in self._changes:
            return
        if change.new_name:
            self._apply(change.new_name)
        self._changes.remove(change)
        _set(self._durable, change)

    def _entry(self, path: str) -> Entry:
        folder, name = os.path.split(path)
        node = self.node(folder)
        assert node is not None, f"{folder} appeared unseen"
        return node, name

    def _paths(self, names: Mapping[Entry, int]) -> dict[str, int]:
        """Every file and folder that can be reached."""
        inside: dict[int, list[tuple[str, int]]] = {}
        for (folder, name), node in names.items():
            inside.setdefault(folder, []).append((name, node))

        def walk(folder: int, at: str) -> Iterator[tuple[str, int]]:
            for name, node in inside.get(folder, []):
                yield f"{at}/{name}", node
                yield from walk(node, f"{at}/{name}")

        return dict(walk(ROOT, str(self.root)))

    def _scan(self, folder: Path, node: int) -> None:
        for path in sorted(folder.iterdir()):
            self._nodes += 1
            self._names[node, path.name] = child = self._nodes
            if path.is_dir():
                self._folders.add(child)
                self._scan(path, child)
            else:
                self._synced[child] = path.read_bytes()


def _set(names: dict[Entry, int], change: Change) -> None:
    if change.node is None:
        names.pop(change.entry, None)
    else:
        names[change.entry] = change.node


def _content(path: str) -> tuple[bytes, int]:
    """Bytes and time of last change of a file."""
    fd = _open(path, os.O_RDONLY)
    try:
        status = _fstat(fd)
        return _read(fd, status.st_size), status.st_mtime_ns
    finally:
        _close(fd)
