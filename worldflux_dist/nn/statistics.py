"""Running mean and variance of what a model is trained on: buffers that move between steps."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn


def merge(parts: Tensor) -> Tensor:
    """Parts (K, 3, n) of one sample, each its number of values, their mean and the sum of squares
    around it, as one (3, n). Exact (Chan et al. 1979), whatever the mean."""
    num, mean, squares = parts.unbind(1)
    total = num.sum(0)
    center = (num * mean).sum(0) / total.clamp(min=1)
    spread = (squares + num * (mean - center).square()).sum(0)
    return torch.stack([total, center, spread])


class RunningMoments(nn.Module):
    """Mean and variance (n,) over the last 1 / rate gradient steps or so.

    `take` notes the values of a batch and `update`, once a gradient step, moves the moments towards
    them, by the share max(1 / k, rate) in step k: exact over the first 1 / rate steps, with nothing
    to be debiased, then a moving average, so that what replay no longer holds is forgotten. They
    stand still between two updates: all parts and ranks of a step see the same, and a loss depends
    on its batch alone. Before the first update they are 0 and 1.
    """

    mean: Tensor
    var: Tensor
    steps: Tensor
    taken: Tensor

    def __init__(self, size: int, rate: float = 0.01, floor: float = 1e-4) -> None:
        super().__init__()
        self.rate, self.floor = rate, floor
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("var", torch.ones(size))
        self.register_buffer("steps", torch.zeros(()))
        self.register_buffer("taken", torch.zeros(3, size), persistent=False)

    @property
    def std(self) -> Tensor:
        """Never below `floor`: what does not vary must not be divided by 0."""
        return self.var.sqrt().clamp(min=self.floor)

    @torch.no_grad()
    def take(self, values: Tensor, keep: Tensor) -> None:
        """Note values (..., n) where keep (...); what is not finite does not count."""
        flat = values.flatten(0, -2)
        used = (keep.flatten()[:, None] & flat.isfinite()).float()
        flat = torch.where(used.bool(), flat, 0.0)
        num = used.sum(0)
        mean = flat.sum(0) / num.clamp(min=1)
        squares = (used * (flat - mean).square()).sum(0)
        self.taken.copy_(merge(torch.stack([self.taken, torch.stack([num, mean, squares])])))

    @torch.no_grad()
    def update(self) -> None:
        """Move the moments towards what was taken, on all ranks together."""
        taken = self.taken
        if dist.is_available() and dist.is_initialized():
            parts = [torch.empty_like(taken) for _ in range(dist.get_world_size())]
            dist.all_gather(parts, taken)
            taken = merge(torch.stack(parts))
        num, mean, squares = taken
        self.steps += num.any()
        share = torch.where(num > 0, (1 / self.steps.clamp(min=1)).clamp(min=self.rate), 0.0)
        change = mean - self.mean
        self.var.lerp_(squares / num.clamp(min=1), share)
        self.var.add_(share * (1 - share) * change.square())
        self.mean.add_(share * change)
        self.taken.zero_()


class Normalised:
    """What is drawn of vectors (..., n), normalised by running moments: the change (`residual`),
    whose scale is what a small step leaves to be learned, or the whole. Mixed into a module."""

    residual: bool
    seen: RunningMoments
    wanted: RunningMoments

    def watch(self, size: int, residual: bool, rate: float) -> None:
        self.residual = residual
        self.seen, self.wanted = RunningMoments(size, rate), RunningMoments(size, rate)

    def scaled(self, target: Tensor, newest: Tensor) -> Tensor:
        """What is drawn of `target` after `newest`."""
        wanted = target - newest if self.residual else target
        return (wanted - self.wanted.mean) / self.wanted.std

    def unscaled(self, x: Tensor, newest: Tensor) -> Tensor:
        drawn = x * self.wanted.std + self.wanted.mean
        return newest + drawn if self.residual else drawn

    def known(self, value: Tensor) -> Tensor:
        """Observations that are given."""
        return (value - self.seen.mean) / self.seen.std

    def take(self, target: Tensor, newest: Tensor, keep: Tensor) -> None:
        """Note the scale of steps from `newest` to `target` where keep (...)."""
        self.wanted.take(target - newest if self.residual else target, keep)
        self.seen.take(newest, torch.ones_like(keep))

    def update_targets(self) -> None:
        """After every gradient step: use what was noted."""
        self.seen.update()
        self.wanted.update()
