"""What draws the next observation from the last ones: for vectors, for images, and of all of them.

Each owns a network and has an objective (nn/denoising.py); it knows the units of observations,
which the objective does not. One interface, over N rows: `history` (N, k, ...) are the last
observations, the newest last, and `told` (N, C) is all else that is known of the step.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worldflux_dist.nn.denoising import LevelEmbedding, Objective
from worldflux_dist.nn.history import Named, Names, past
from worldflux_dist.nn.layers import Linear, NormedLinear
from worldflux_dist.nn.statistics import Normalised
from worldflux_dist.nn.unet import UNet


class Denoiser(nn.Module, ABC):
    """`noise_size` is how many numbers of noise one sample starts from."""

    noise_size: int

    def __init__(self, objective: Objective) -> None:
        super().__init__()
        self.objective = objective

    @abstractmethod
    def loss(self, target: Tensor, history: Tensor, told: Tensor, num_pairs: int) -> Tensor:
        """The objective's losses (N,) of the observations `target` (N, ...)."""

    @abstractmethod
    def sample(self, normal: Tensor, history: Tensor, told: Tensor, steps: int) -> Tensor:
        """Observations (N, ...) from normal noise (N, noise_size)."""

    def take(self, target: Tensor, newest: Tensor, keep: Tensor) -> None:
        """Note the scale of steps from `newest` to `target` where keep (N,)."""

    def update_targets(self) -> None:
        """After every gradient step: use what was noted."""


class ResidualBlock(nn.Module):
    """x + W_2 silu((1 + scale) norm(W_1 x) + shift), with scale and shift from a condition."""

    def __init__(self, units: int) -> None:
        super().__init__()
        self.first, self.second = Linear(units, units), Linear(units, units)
        self.modulation = Linear(units, 2 * units, outscale=0.0)

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        scale, shift = self.modulation(cond).chunk(2, -1)
        hidden = F.rms_norm(self.first(x), x.shape[-1:], eps=1e-4)
        return x + self.second(F.silu((1 + scale) * hidden + shift))


class VectorNet(nn.Module):
    """(noisy (N, n), level (N, L), cond (N, C)) -> (N, n): residual blocks that level and condition
    scale and shift; the first layer sees the condition, too. A fresh one answers 0."""

    def __init__(self, size: int, cond: int, levels: int, units: int, blocks: int) -> None:
        super().__init__()
        self.levels = LevelEmbedding(levels)
        self.cond = NormedLinear(self.levels.size_out + cond, units)
        self.enter = Linear(size + cond, units)
        self.blocks = nn.ModuleList(ResidualBlock(units) for _ in range(blocks))
        self.norm, self.leave = NormedLinear(units, units), Linear(units, size, outscale=0.0)

    def forward(self, noisy: Tensor, level: Tensor, cond: Tensor) -> Tensor:
        modulation = self.cond(torch.cat([self.levels(level), cond], -1))
        x = self.enter(torch.cat([noisy, cond], -1))
        for block in self.blocks:
            x = block(x, modulation)
        return self.leave(self.norm(x))


class VectorDenoiser(Normalised, Denoiser):
    """Draws vectors (N, n). History and target are normalised by running moments; the target is the
    change (`residual`), whose scale is what a small step leaves to be learned, or the whole."""

    def __init__(
        self,
        objective: Objective,
        size: int,
        length: int,
        told: int,
        units: int,
        blocks: int,
        residual: bool = True,
        rate: float = 0.01,
    ) -> None:
        super().__init__(objective)
        self.noise_size = size
        self.net = VectorNet(size, size * length + told, objective.levels, units, blocks)
        self.watch(size, residual, rate)

    def loss(self, target: Tensor, history: Tensor, told: Tensor, num_pairs: int) -> Tensor:
        x = self.objective.std * self.scaled(target, history[:, -1])
        return self.objective.loss(self.net, x, [self._cond(history, told)], num_pairs)

    def sample(self, normal: Tensor, history: Tensor, told: Tensor, steps: int) -> Tensor:
        x = self.objective.sample(self.net, normal, [self._cond(history, told)], steps)
        return self.unscaled(x / self.objective.std, history[:, -1])

    def _cond(self, history: Tensor, told: Tensor) -> Tensor:
        return torch.cat([self.known(history).flatten(1), told], -1)


class ImageDenoiser(Denoiser):
    """Draws images (N, H, W, C) uint8 with a U-Net on frames in [-1, 1]."""

    def __init__(
        self,
        objective: Objective,
        shape: tuple[int, ...],
        length: int,
        told: int,
        channels: tuple[int, ...],
        blocks: int,
        units: int,
    ) -> None:
        super().__init__(objective)
        self.shape, colors = shape, shape[-1]
        self.noise_size = math.prod(shape)
        sizes = (objective.levels, channels, blocks, units)
        self.net = UNet(colors * (1 + length), colors, told, *sizes)

    def loss(self, target: Tensor, history: Tensor, told: Tensor, num_pairs: int) -> Tensor:
        cond = [self._frames(history), told]
        return self.objective.loss(self.net, self._frames(target[:, None]), cond, num_pairs)

    def sample(self, normal: Tensor, history: Tensor, told: Tensor, steps: int) -> Tensor:
        height, width, _ = self.shape
        noise = normal.unflatten(-1, (-1, height, width))
        x = self.objective.sample(self.net, noise, [self._frames(history), told], steps)
        levels = ((x.clamp(-1, 1) + 1) * 127.5).round()
        return levels.to(torch.uint8).permute(0, 2, 3, 1)

    def _frames(self, images: Tensor) -> Tensor:
        """(N, k, H, W, C) uint8 -> (N, k C, H, W) in [-1, 1]."""
        return images.permute(0, 1, 4, 2, 3).flatten(1, 2).float() / 127.5 - 1


def of(value: Tensor, at: Tensor) -> Tensor:
    """The steps `at` (S,) of (B, T, ...), one after the other: (S * B, ...)."""
    return value[:, at].transpose(0, 1).flatten(0, 1)


class Denoisers(nn.ModuleList):
    """All that draw the next of a state's tensors: `parts` has for each, by the name of its loss,
    the tensors that it draws as one.

    They are told the actions and, if so, the memory and the last embedding. Of images, only so many
    steps of a row are denoised in a gradient step; 0 is all.
    """

    def __init__(
        self,
        parts: dict[str, tuple[Names, Denoiser]],
        memory: bool = True,
        embed: bool = False,
        image_steps: int = 0,
    ) -> None:
        super().__init__(denoiser for _, denoiser in parts.values())
        self.parts = {loss: names for loss, (names, _) in parts.items()}
        self.memory, self.embed, self.image_steps = memory, embed, image_steps
        self.noise_sizes = [denoiser.noise_size for _, denoiser in parts.values()]
        self.noise_size = sum(self.noise_sizes)

    def draw(self, old: Named, action: Tensor, memory: Tensor, normal: Tensor, steps: int) -> Named:
        """What follows the state `old` (N, ...), from normal noise (N, noise_size)."""
        new: Named = {}
        told = self._told(old, action, memory)
        parts: Any = zip(self.parts.values(), self, normal.split(self.noise_sizes, -1), strict=True)
        for names, denoiser, start in parts:
            drawn = denoiser.sample(start, self._history(old, names), told, steps)
            sizes = [old[name].shape[-1] for name in names]
            new |= dict(zip(names, drawn.split(sizes, -1), strict=True))
        return new

    def losses(self, states: Named, action: Tensor, is_first: Tensor) -> Named:
        """Losses (B, T - 1) of the steps into 1..T-1, of images (B, image_steps) of some of them;
        0 for the step into a reset."""
        num, length = action.shape[:2]
        order = torch.rand(length - 1, device=action.device).argsort(stable=True)
        keep, losses = ~is_first[:, 1:], {}
        parts: Any = zip(self.parts.items(), self, strict=True)
        for (loss_name, names), denoiser in parts:
            few = self.image_steps if isinstance(denoiser, ImageDenoiser) else 0
            steps = order[: few or None]
            old = {n: of(x, steps) for n, x in states.items()}
            memory, acted = of(states["memory"], steps + 1), of(action, steps + 1)
            told, history = self._told(old, acted, memory), self._history(old, names)
            target = torch.cat([of(states[name], steps + 1) for name in names], -1)
            num_pairs = max(1, len(steps) // 4) * num
            if torch.is_grad_enabled():
                denoiser.take(target, history[:, -1], of(keep, steps))
            loss = denoiser.loss(target, history, told, num_pairs).unflatten(0, (-1, num)).t()
            at = steps.argsort()
            losses[loss_name] = loss[:, at] * keep[:, steps[at]]
        return losses

    def update_targets(self) -> None:
        every: Any = self
        for denoiser in every:
            denoiser.update_targets()

    def _told(self, old: Named, action: Tensor, memory: Tensor) -> Tensor:
        """What each is told of the step from the state `old` by `action`: (N, C)."""
        told = [old["past_action"].flatten(1)] if "past_action" in old else []
        told += [action, *[memory] * self.memory, *[old["embed"]] * self.embed]
        return torch.cat(told, -1)

    def _history(self, old: Named, names: Names) -> Tensor:
        """The last observations (N, k, ...), oldest first; vectors as one."""
        newest = torch.cat([old[name] for name in names], -1).unsqueeze(1)
        if past(names[0]) not in old:
            return newest
        return torch.cat([torch.cat([old[past(name)] for name in names], -1), newest], 1)
