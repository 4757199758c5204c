"""Start writing a file's dirty pages to disk without waiting for it."""

import ctypes
import sys
from typing import Final

SYNC_FILE_RANGE_WRITE: Final = 2  # linux/fs.h


def start_writeback(fd: int) -> None:
    """Ask Linux to begin writing all dirty pages of `fd`; does nothing elsewhere.

    Only a hint: a later fsync makes the file durable and reports errors, so a failure here is of no
    consequence.
    """
    if sys.platform == "linux":
        call = ctypes.CDLL(None).sync_file_range
        call.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
        call(fd, 0, 0, SYNC_FILE_RANGE_WRITE)
