"""Settings of the C library's memory allocator."""

from __future__ import annotations

import ctypes
import platform

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
MOST_MMAP_THRESHOLD = 32 * 2**20  # bytes, glibc's maximum


def keep_memory() -> None:
    """Make the C library reuse freed memory. Call it before much is allocated.

    By default glibc returns the memory of a training step (or a picture) to the system and requests it again in the next one, and the
    system clears every page. Does nothing with other C libraries.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    mallopt = ctypes.CDLL(None).mallopt
    for parameter, value in ((M_TRIM_THRESHOLD, 2**31 - 1), (M_MMAP_THRESHOLD, MOST_MMAP_THRESHOLD)):
        mallopt(parameter, value)
