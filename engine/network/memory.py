"""The host's memory: what a process of ours asks of the C library's allocator."""

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX, _M_MMAP_MAX = -1, -3, -8, -4  # malloc.h of glibc


def keep_freed_memory() -> bool:
    """Tells glibc to keep what is freed for the next allocation instead of giving it back to the kernel.

    A training step or a pass over texts on the CPU allocates the same tensors again and again; given back, every one of
    them costs a page fault per 4 KiB, most of all the largest, such as the gradient of an embedding. Peak memory is
    unchanged. Returns whether it was done: only on Linux with glibc.
    """
    if sys.platform != "linux":
        return False
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):
        return False
    settings = ((_M_MMAP_THRESHOLD, 1 << 25), (_M_TRIM_THRESHOLD, (1 << 31) - 1), (_M_ARENA_MAX, 1), (_M_MMAP_MAX, 0))
    done = [libc.mallopt(parameter, value) for parameter, value in settings]
    return all(done)
