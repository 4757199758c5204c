"""What a run takes, looked at from outside."""

import os
import threading
from pathlib import Path

import psutil

SAMPLE_S = 0.0005


def anonymous_bytes(pid: int) -> int:
    """What a process tree holds beside pages of files, which the system may drop: shared pieces count once."""
    total = 0
    try:
        pids = [pid, *(p.pid for p in psutil.Process(pid).children(recursive=True))]
    except psutil.NoSuchProcess:
        return 0
    for p in pids:
        try:
            lines = Path(f"/proc/{p}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        total += sum(int(line.split()[1]) << 10 for line in lines if line.startswith(("Pss_Anon:", "Pss_Shmem:")))
    return total


def used_bytes(folder: Path) -> int:
    """Of the disk, by all files below a folder. What moves meanwhile counts once."""
    sizes: dict[int, int] = {}
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                found = os.stat(os.path.join(place, name))
            except FileNotFoundError:
                continue
            sizes[found.st_ino] = found.st_blocks * 512
    return sum(sizes.values())


class Meter:
    """Looks at what a folder takes of the disk, again and again."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._over = folder, threading.Event()
        self.peak_bytes = self.samples = 0
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> "Meter":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def look(self, _step: object) -> None:
        """Also at every step of the run, when a file has just come or gone."""
        self.peak_bytes = max(self.peak_bytes, used_bytes(self._folder))
        self.samples += 1

    def _watch(self) -> None:
        while not self._over.wait(SAMPLE_S):
            now = used_bytes(self._folder)
            self.peak_bytes = max(self.peak_bytes, now)
            self.samples += 1
