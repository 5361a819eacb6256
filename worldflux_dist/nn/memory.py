"""Memory: how a process that computes on a CPU holds it, and how much a file may ask for."""

from __future__ import annotations

import ctypes
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


def keep_freed_memory() -> None:
    """Ask glibc, where it is the allocator, not to give freed memory back to the system.

    A step frees and takes gigabytes of large tensors; mapping their pages anew each time is a
    fifth of a CPU learner's time, and a tenth of a plan's.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(-4, 0)  # M_MMAP_MAX: large blocks come from the heap too
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: and the heap is never trimmed


def read_only(value: np.ndarray) -> Tensor:
    """A tensor in the memory of an array, which may be shared with other processes: to be read."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(np.asarray(value))


def copies(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies of named tensors where they are, for `arrays` at a later time, beside whatever goes
    on to change them."""
    return {name: value.detach().clone() for name, value in state.items()}


def arrays(tensors: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """Named tensors as arrays: in the same memory, or copies from a GPU."""
    return {name: value.cpu().numpy() for name, value in tensors.items()}


class Allowance(TorchFunctionMode):
    """Lets no more than so many numbers be made: a size from a file must not fill the memory.

    Raises ValueError when there are more, before they are written to, which is what takes memory.
    """

    def __init__(self, numbers: int) -> None:
        super().__init__()
        self.left = numbers + 2**22  # what is no parameter is small

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        try:
            made = func(*args, **(kwargs or {}))
        except RuntimeError as error:  # torch's word for sizes that no machine has
            raise ValueError(f"the agent's sizes cannot be: {error!s:.100}") from error
        if func in (torch.empty, torch.zeros, torch.ones, torch.full, torch.linspace):
            self.left -= made.numel()
            if self.left < 0:
                raise ValueError("its sizes make an agent far larger than the weights beside it")
        return made
