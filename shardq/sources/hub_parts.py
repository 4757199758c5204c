"""Files beside the target of a download: the part that has arrived, and what had a wrong hash."""

import ctypes
import errno
import os
import re
import sys
from contextlib import suppress
from pathlib import Path
from typing import Final

from shardq.files.atomic import explain_os_error, writing
from shardq.sources.hub_sinks import FileSink

_KEY_DIGITS: Final = 12
_KEEP_SIZE: Final = 1  # linux/falloc.h


def part_path(target: Path, content_sha256: str) -> Path:
    """`target.KEY.part`. The key names the content, so that a part of anything else is never taken up."""
    return target.with_name(f"{target.name}.{content_sha256[:_KEY_DIGITS]}.part")


def xet_path(target: Path) -> Path:
    """`target.xet.part`: being written by hf_xet, in an order of its own; of no use when that fails."""
    return target.with_name(f"{target.name}.xet.part")


def bad_path(target: Path) -> Path:
    """`target.bad`: a download with a wrong hash, for whoever wants to look at it."""
    return target.with_name(f"{target.name}.bad")


def remove_leftovers(target: Path, part: Path) -> None:
    """Delete what earlier calls left for `target`, except `part`. Raises NotWritable."""
    ours = re.compile(rf"{re.escape(target.name)}(\.[0-9a-f]{{{_KEY_DIGITS}}}\.part|\.xet\.part|\.bad)")
    with writing(target):
        for name in os.listdir(target.parent):
            if ours.fullmatch(name) and name != part.name:
                with suppress(FileNotFoundError):
                    os.unlink(target.with_name(name))


def reserve(fd: int, size_bytes: int, part: Path) -> None:
    """Reserve blocks for the whole file where Linux can, so that a full disk shows now and writing costs less.

    The size of the file stays what has arrived, which is where the next call goes on. Raises DiskFull.
    """
    if sys.platform != "linux" or size_bytes == 0:
        return
    call = ctypes.CDLL(None, use_errno=True).fallocate
    call.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    if call(fd, _KEEP_SIZE, 0, size_bytes) == 0:
        return
    code = ctypes.get_errno()
    if code in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}:
        raise explain_os_error(OSError(code, os.strerror(code)), part, writing=True)
    # Anything else: a file system that cannot reserve.


def keep_part(sink: FileSink, part: Path, fd: int) -> None:
    """Leave what has arrived for the next call; an empty part is removed. Does nothing after a success."""
    try:
        sink.keep()
        if os.fstat(fd).st_size == 0:
            with suppress(FileNotFoundError):
                os.unlink(part)
    finally:
        os.close(fd)
