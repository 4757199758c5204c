"""Files without a name: they go when nobody holds them any more, also when the process is killed."""

import tempfile
from pathlib import Path
from typing import IO

from shardq.files.atomic import writing


def open_nameless(folder: Path, kind: str) -> IO[bytes]:
    """An empty file on the disk of a folder, to write and read. Where the system cannot make one without a name it has
    one of `kind` for a moment, which `remove_unfinished` finds. Raises DiskFull, NotWritable."""
    with writing(folder):
        return tempfile.TemporaryFile(dir=folder, prefix=f".{kind}.", suffix=".tmp")
