"""What the ranks of a learner group must agree on beside their gradients.

A rank sees a part of each batch. Whatever is computed over a whole batch and enters the learning
goes through here; alone, in a process without a group, both functions give back what they got.
Every rank must make the same calls in the same order.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def gather(x: Tensor) -> Tensor:
    """x (N, ...) of all ranks, one after the other: (ranks * N, ...), without gradient."""
    if not _grouped():
        return x
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


def average(x: Tensor) -> Tensor:
    """The mean over ranks; a NaN or infinity of one rank is seen by all. Changes x in place."""
    if _grouped():
        dist.all_reduce(x)
        x /= dist.get_world_size()
    return x


def _grouped() -> bool:
    return dist.is_available() and dist.is_initialized()
