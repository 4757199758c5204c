"""Runs a scene once, undisturbed, under `crash_shim.c`; prints the calls that the sweep would disturb, as JSON.

    LD_PRELOAD=shim.so python crash_trace.py SCENE CHECKPOINT FOLDER LOG

The shim writes its own count into LOG.
"""

import ctypes
import json
import sys
from pathlib import Path

from crash_calls import Watch
from crash_disk import Disk
from crash_scenes import SCENES


def main(scene: str, original: Path, folder: Path, log: Path) -> None:
    """Count twice."""
    made = SCENES[scene](folder / "disk", original)
    made.prepare()
    watch = Watch(Disk(made.disk), folder / "disk.pickle", None, ())
    watch.begin()
    ctypes.CDLL(None).crash_begin(str(made.disk).encode(), str(log).encode())
    made.run()
    assert not watch.escaped, watch.escaped
    print(json.dumps(watch.calls))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), Path(sys.argv[4]))
