"""Give freed memory back at once where a merge works on large blocks."""

import ctypes

_M_MMAP_THRESHOLD = -3  # glibc's malloc.h
_BLOCK = 4 << 20
# Below this, keeping freed blocks is cheaper than asking the system for them again.
_LARGE = 64 << 20


def return_large_blocks(working_bytes: int, *, block: int = _BLOCK) -> None:
    """Let glibc unmap freed blocks of a size (4 MiB) and more, if a worker needs so much memory.

    glibc raises the size from which on it unmaps blocks to 32 MiB as they are freed, and then keeps
    the smaller ones on its heaps. With 64 adapters of rank 16 (Grams of 8 MB) that was a quarter of
    the process: 697 MB at the peak, 527 MB so. Small merges are faster the other way. For the
    process of a command only; a library does not change its host's allocator.
    """
    if working_bytes < _LARGE:
        return
    try:
        ctypes.CDLL("libc.so.6").mallopt(_M_MMAP_THRESHOLD, block)
    except (OSError, AttributeError):
        return  # not glibc: nothing to set
