"""How a process that computes on a CPU should hold its memory."""

from __future__ import annotations

import ctypes


def keep_freed_memory() -> None:
    """Ask glibc, where it is the allocator, not to give freed memory back to the system.

    A step frees and takes gigabytes of large tensors; mapping their pages anew each time is a
    fifth of a CPU learner's time, and a tenth of a plan's.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(-4, 0)  # M_MMAP_MAX: large blocks come from the heap too
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: and the heap is never trimmed
