"""What the C library does with memory that is freed."""

import ctypes
from typing import Final

MMAP_THRESHOLD: Final = -3  # M_MMAP_THRESHOLD of glibc's malloc.h
AT_ONCE_BYTES: Final = 1 << 22


def return_freed_memory() -> None:
    """Have glibc give arrays of AT_ONCE_BYTES and more back to the system when they are freed, for the rest of this
    process; other libraries are left alone. By itself it comes to keep all below 32 MB, between pieces that are in use:
    more than a block, where a block's arrays are of such sizes."""
    library = ctypes.CDLL(None)
    if hasattr(library, "gnu_get_libc_version"):
        library.mallopt(MMAP_THRESHOLD, AT_ONCE_BYTES)


def give_back() -> None:
    """Have glibc give all memory that is free now back to the system; what was freed between pieces that are in use
    stays with it otherwise."""
    library = ctypes.CDLL(None)
    if hasattr(library, "malloc_trim"):
        library.malloc_trim(0)
