"""Memory: how the C library deals with it."""

from __future__ import annotations

import ctypes
import platform

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
MOST_MMAP_THRESHOLD = 32 * 2**20  # bytes; it takes no more


def keep_memory() -> None:
    """Have the C library keep what is freed for what is asked for next; to be called before much is allocated.

    glibc gives the freed memory of a training step (or of a picture) back to the system and asks for it again in the next one, and the system
    clears every page of it. Where the C library is another one, nothing is done.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    mallopt = ctypes.CDLL(None).mallopt
    for parameter, value in ((M_TRIM_THRESHOLD, 2**31 - 1), (M_MMAP_THRESHOLD, MOST_MMAP_THRESHOLD)):
        mallopt(parameter, value)
