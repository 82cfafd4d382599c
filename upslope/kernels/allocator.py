"""How the process keeps memory between one step and the next."""

from __future__ import annotations

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h of glibc


def keep_freed_memory() -> bool:
    """Let freed memory be used again instead of giving it back to the system; returns whether the C library heard it.

    Every step frees and asks for the same large tensors. By default each of them is a new mapping, whose pages the
    system clears at the first touch, which takes a third of a training step's time on a CPU.
    """
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    if mallopt is None:
        return False
    return bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, -1))
