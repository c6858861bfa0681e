"""Settings of the host process, made before its first computation."""

import ctypes
import os
import sys

# malloc.h of the GNU C library
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def keep_freed_memory() -> bool:
    """Makes malloc keep what is freed, instead of giving it back to the kernel; True where that is possible.

    XLA's CPU backend allocates the temporaries of a step anew for every step. By default glibc maps and unmaps
    them each time, and the page faults took 13 % of the digits' training step, 45 % of the gradient of one
    feed-forward layer.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # absent in other C libraries
    settings = ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1), (M_TOP_PAD, 64 << 20))
    return mallopt is not None and all([mallopt(name, value) for name, value in settings])
