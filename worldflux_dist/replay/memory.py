"""Large arrays that take no memory where nobody has written, and give it all back at the end.

numpy's own zeros come from malloc, which a learner in the same process tells to keep what it frees
(see learner.py): a second buffer would then be cleared by hand, and touched, from end to end.
"""

from __future__ import annotations

import mmap

import numpy as np


def zeros(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An array of zeros in pages of its own. Raises OSError where the system has not as many."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    pages = mmap.mmap(-1, max(size, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return np.frombuffer(pages, np.uint8, size).view(dtype).reshape(shape)
