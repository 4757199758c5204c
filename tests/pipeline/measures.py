"""What a run takes, looked at from outside."""

import os
from pathlib import Path

import psutil


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
