"""Which of two forms of a value is computed: the one that a CPU is quick with, or the plain one.

A CPU takes some operators three to ten times faster when they are written out, or as others. GPUs
have kernels for the plain forms. Both give the same but for rounding (tests/test_accelerator.py).
"""

from __future__ import annotations

from torch import Tensor

PLAIN = False  # whether CPUs take the plain forms, too: tests set it


def for_cpu(x: Tensor) -> bool:
    """Whether what is computed of x takes the form that is meant for CPUs."""
    return x.device.type == "cpu" and not PLAIN
