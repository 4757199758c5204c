"""Follows every call of this process that changes files below a folder, and makes one of them go wrong.

    kill       the process dies instead of making the call
    torn       half of a write reaches the file, then the process dies
    short      half of a write reaches the file, and the call says so
    ENOSPC     the call fails: no space left
    EIO        the call fails: the device reports an error
    undone ... the power goes instead of the call; see crash_disk.py

Not a test by itself: `fault_driver.py` uses it.
"""

import errno
import os
import random
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, NoReturn

from crash_disk import CUTS, Disk

WRITES: Final = ("pwrite", "write")
NAMES: Final = ("replace", "rename", "unlink", "remove", "mkdir", "rmdir")
SIZES: Final = ("ftruncate", "posix_fallocate")
SYNCS: Final = ("fsync", "fdatasync")
# Nothing here follows these: a run that comes to use one of them on its files needs more code here.
UNKNOWN: Final = ("link", "symlink", "truncate", "pwritev", "writev", "sendfile", "copy_file_range", "splice")
ERRORS: Final = {"ENOSPC": errno.ENOSPC, "EIO": errno.EIO}
ONLY_WRITES: Final = ("torn", "short")
KINDS: Final = ("kill", *ONLY_WRITES, *ERRORS, *CUTS)
DEADLY: Final = ("kill", "torn", *CUTS)  # these end the process


@dataclass(frozen=True, slots=True)
class Fault:
    """What goes wrong at the call with a number, from 1."""

    kind: str
    call: int
    seed: int = 0


class Watch:
    """Replaces functions of `os`; for the rest of the process's life."""

    def __init__(self, disk: Disk, saved: Path, fault: Fault | None, forgotten: Sequence[str]) -> None:
        """`saved` gets the disk when the process dies. An fsync in a function of `forgotten` (qualified names, from
        the innermost out, `<` between them) is left out, as a bug would."""
        self.calls: list[str] = []
        self.escaped: list[str] = []  # changes that came by another way
        self._disk, self._saved, self._fault, self._forgotten = disk, saved, fault, forgotten
        self._inside = f"{disk.root}/"
        self._paths: dict[int, str] = {}  # of open descriptors below the root
        self._lock = threading.RLock()  # no call while another one dies
        self._plain: dict[str, Callable[..., Any]] = {}

    def begin(self) -> None:
        """From now on."""
        known: dict[str, Callable[..., Any]] = {
            "open": self._open,
            "close": self._close,
            **{n: partial(self._write, n) for n in WRITES},
            **{n: partial(self._resize, n) for n in SIZES},
            **{n: partial(self._sync, n) for n in SYNCS},
            **{n: partial(self._rename, n) for n in NAMES[:2]},
            **{n: partial(self._rename_away, n) for n in ("unlink", "remove", "rmdir")},
            "mkdir": self._mkdir,
            **{n: partial(self._refuse, n) for n in UNKNOWN},
        }
        for name, call in known.items():
            if hasattr(os, name):
                self._plain[name] = getattr(os, name)
                setattr(os, name, call)
        sys.addaudithook(self._audit)

    # --- the calls ---------------------------------------------------------------------------------------------------

    def _open(self, path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        with self._lock:
            full = self._full(path, dir_fd)
            new = full is not None and flags & os.O_CREAT != 0
            if full and new:
                self._count("open")
            there = full is not None and self._disk.node(full) is not None
            fd: int = self._plain["open"](path, flags, mode, dir_fd=dir_fd)
            self._paths.pop(fd, None)
            if full:
                self._paths[fd] = full
                if new and not there:
                    self._disk.created(full, folder=False)
            return fd

    def _close(self, fd: int) -> None:
        with self._lock:
            self._paths.pop(fd, None)
            self._plain["close"](fd)

    def _write(self, name: str, fd: int, data: Any, *offset: int) -> int:
        plain = self._plain[name]
        if fd not in self._paths:
            return int(plain(fd, data, *offset))
        with self._lock:
            half = memoryview(data).cast("B")[: max(1, memoryview(data).nbytes // 2)]
            kind = self._count(name)
            at = offset[0] if offset else os.lseek(fd, 0, os.SEEK_CUR)
            written = int(plain(fd, half if kind in ONLY_WRITES else data, *offset))
            self._disk.wrote(self._disk.node(self._paths[fd]), at, written)
            if kind == "torn":
                self._die()
            return written

    def _resize(self, name: str, fd: int, *sizes: int) -> None:
        with self._lock:
            if fd in self._paths:
                self._count(name)
            self._plain[name](fd, *sizes)

    def _sync(self, name: str, fd: int) -> None:
        """Never waits for the true disk, whose power nobody will cut."""
        with self._lock:
            if fd not in self._paths:
                return
            node = self._disk.node(self._paths[fd])
            try:
                self._count(name)
            except OSError:
                self._disk.failed(node)
                raise
            if node is not None and not any(_called_by(f, sys._getframe(1)) for f in self._forgotten):
                self._disk.synced(node)

    def _rename(self, name: str, old: Any, new: Any) -> None:
        with self._lock:
            full_old, full_new = self._full(old, None), self._full(new, None)
            if full_old is None or full_new is None:
                assert full_old is full_new, f"{old} -> {new} crosses the border"
                self._plain[name](old, new)
                return
            self._count(name)
            self._disk.removing(full_new)
            self._plain[name](old, new)
            self._disk.renamed(full_old, full_new)

    def _rename_away(self, name: str, path: Any, *, dir_fd: int | None = None) -> None:
        with self._lock:
            full = self._full(path, dir_fd)
            if full is None:
                self._plain[name](path, dir_fd=dir_fd)
                return
            self._count(name)
            self._disk.removing(full)
            self._plain[name](path, dir_fd=dir_fd)
            self._disk.removed(full)

    def _mkdir(self, path: Any, mode: int = 0o777, *, dir_fd: int | None = None) -> None:
        with self._lock:
            full = self._full(path, dir_fd)
            if full:
                self._count("mkdir")
            self._plain["mkdir"](path, mode, dir_fd=dir_fd)
            if full:
                self._disk.created(full, folder=True)

    def _refuse(self, name: str, *words: Any, **named: Any) -> Any:
        """A call that nothing here follows."""
        if any(isinstance(w, (str, os.PathLike)) and self._full(w, None) for w in words) or words[0] in self._paths:
            self.escaped.append(name)
        return self._plain[name](*words, **named)

    # --- what goes wrong ---------------------------------------------------------------------------------------------

    def _count(self, name: str) -> str | None:
        """Count a call; at the chosen one die, fail, or return what the caller has to do."""
        self.calls.append(name)
        if self._fault is None or len(self.calls) != self._fault.call:
            return None
        kind = self._fault.kind
        if kind in ERRORS:
            raise OSError(ERRORS[kind], os.strerror(ERRORS[kind]))
        if kind in CUTS:
            self._disk.cut(kind, random.Random(self._fault.seed))
            self._saved.unlink(missing_ok=True)  # all that is left is durable
            self._kill()
        if kind == "kill":
            self._die()
        return kind

    def _die(self) -> NoReturn:
        self._disk.save(self._saved)
        self._kill()

    def _kill(self) -> NoReturn:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("still alive")

    # --- paths -------------------------------------------------------------------------------------------------------

    def _full(self, path: Any, dir_fd: int | None) -> str | None:
        """The path if it lies below the root; a descriptor's name counts as none."""
        if isinstance(path, int):
            return None
        text = os.fspath(path)
        if dir_fd is not None:
            if dir_fd not in self._paths:
                return None
            text = f"{self._paths[dir_fd]}/{text}"
        return text if f"{text}/".startswith(self._inside) else None

    def _audit(self, event: str, words: tuple[Any, ...]) -> None:
        """Python's own files do not go through os.open."""
        if event == "open" and isinstance(words[1], str) and set(words[1]) & set("wax+") and self._full(words[0], None):
            self.escaped.append(f"open({words[0]!r}, {words[1]!r})")


def _called_by(chain: str, frame: Any) -> bool:
    """True if of a chain `inner<outer<...` the first function makes the call, and the others are further out."""
    inner, *outer = chain.split("<")
    while frame.f_code.co_filename == __file__:
        frame = frame.f_back
    stack: list[str] = []
    while frame is not None:
        stack.append(frame.f_code.co_qualname)
        frame = frame.f_back
    return stack[0] == inner and all(name in stack for name in outer)
