"""Memory of the C library that is freed in one step and needed in the next."""

from __future__ import annotations

import ctypes
import os
import platform

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # parameters of mallopt(3)
KEPT_BYTES = 2**31 - 1  # the largest int
# From this size on, blocks are mapped on their own. Before 2.35, glibc allows no more than 2**25.
MMAP_BYTES = (2**30, 2**25)


def keep_freed_memory() -> bool:
    """Let glibc keep the memory of freed tensors for the next ones.

    By default it returns large blocks to the system and maps new ones in the next step, which costs
    thousands of page faults. The peak is the same. This does nothing with another C library, or
    if an environment variable configures the allocator.

    Returns:
        Whether freed memory is kept.
    """
    is_configured = any(name in os.environ for name in ("GLIBC_TUNABLES", "LD_PRELOAD")) or any(
        name.startswith("MALLOC_") for name in os.environ
    )
    if platform.libc_ver()[0] != "glibc" or is_configured:
        return False
    mallopt = ctypes.CDLL(None).mallopt
    trims_less = mallopt(M_TRIM_THRESHOLD, KEPT_BYTES) == 1
    return trims_less and any(mallopt(M_MMAP_THRESHOLD, size) == 1 for size in MMAP_BYTES)
