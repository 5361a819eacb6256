"""Two ways to learn and to draw from p(x | cond) by denoising, whatever the network is.

An objective knows noise and no network. What it is given is F(noisy, level, *cond): the network's
answer (N, ...) to a noised x (N, ...), to numbers `level` (N, L) that say how noisy, and to
conditions (N, ...). What must stay true: where draws are given, nothing else is drawn; losses and
samples are float32 whatever the network computes in.

EDM (Karras et al. 2022), as DIAMOND uses it: y = x + sigma n, s^2 = sigma^2 + offset^2,

    D(y) = c_skip y + c_out F(c_in y, ln(s) / 4),        L = |F - (x - c_skip y) / c_out|^2
    c_in = 1 / sqrt(s^2 + sd^2),  c_skip = sd^2 / (s^2 + sd^2),  c_out = s sd / sqrt(s^2 + sd^2)

Shortcut forcing (Dreamer 4, after Frans et al. 2024): z = (1 - tau) n + tau x,

    F(z, tau, d) predicts x:   L = (0.9 tau + 0.1) |F - x|^2             for the smallest step d
                               L = (0.9 tau + 0.1) |F - x_2|^2           for all larger ones

where x_2 is what two steps of d / 2 lead to. The published second loss compares velocities
(F - z) / (1 - tau) and is weighed by (1 - tau)^2, which is the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor, nn

Network = Callable[..., Tensor]


class Draws(NamedTuple):
    """What fixes a loss: noise as x, normal; level (N, 2), uniform; shift (N, C), normal."""

    noise: Tensor
    level: Tensor
    shift: Tensor

    @classmethod
    def of(cls, x: Tensor) -> Draws:
        level = torch.rand(len(x), 2, device=x.device)
        return cls(torch.randn_like(x), level, torch.randn(x.shape[:2], device=x.device))


class Objective(Protocol):
    """`levels` L numbers tell the network how noisy its input is; `std` is that which x must have
    for the objective's constants to fit."""

    levels: ClassVar[int]
    std: float

    def loss(
        self,
        network: Network,
        x: Tensor,
        cond: Sequence[Tensor],
        num_pairs: int,
        draws: Draws | None = None,
    ) -> Tensor:
        """Mean squared errors (N,) of denoising x (N, ...). The first `num_pairs` rows learn from
        pairs of steps, where the objective has such."""

    def sample(self, network: Network, noise: Tensor, cond: Sequence[Tensor], steps: int) -> Tensor:
        """x (N, ...) from normal noise (N, ...), in `steps` evaluations of the network."""


def _like(value: Tensor, x: Tensor) -> Tensor:
    """(N,) or (N, C) with as many axes as x."""
    return value.view(*value.shape, *[1] * (x.ndim - value.ndim))


class EDM:
    """`offset` moves all pixels of a channel together (images only). The sampler starts from
    N(0, sigma_max^2), or with `unit_start` from N(0, 1), as DIAMOND does."""

    levels: ClassVar[int] = 1
    MEAN, SPREAD, LOWEST, HIGHEST = -0.4, 1.2, 0.002, 20.0  # of sigma in the loss

    def __init__(
        self,
        std: float = 0.5,
        offset: float = 0.0,
        unit_start: bool = False,
        sigma_min: float = 0.002,
        sigma_max: float = 5.0,
    ) -> None:
        self.std, self.offset, self.unit_start = std, offset, unit_start
        self.sigma_min, self.sigma_max = sigma_min, sigma_max

    def loss(
        self,
        network: Network,
        x: Tensor,
        cond: Sequence[Tensor],
        num_pairs: int = 0,
        draws: Draws | None = None,
    ) -> Tensor:
        draws = Draws.of(x) if draws is None else draws
        normal = torch.special.ndtri(draws.level[:, 0].clamp(1e-6, 1 - 1e-6))
        sigma = (self.MEAN + self.SPREAD * normal).exp().clamp(self.LOWEST, self.HIGHEST)
        noisy = x + _like(sigma, x) * draws.noise
        if self.offset:
            noisy = noisy + self.offset * _like(draws.shift, x)
        scaled, level, target = self.regression(x, noisy, sigma)
        return (network(scaled, level, *cond).float() - target).square().flatten(1).mean(1)

    def scales(self, sigma: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """c_in, c_skip, c_out, as many axes as x, and the level (N, 1)."""
        s2 = sigma.square() + self.offset**2
        total = s2 + self.std**2
        c_in, c_out = total.rsqrt(), s2.sqrt() * self.std * total.rsqrt()
        level = (s2.log() / 8).unsqueeze(-1)  # ln(s) / 4
        return _like(c_in, x), _like(self.std**2 / total, x), _like(c_out, x), level

    def regression(self, x: Tensor, noisy: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What the network gets, its level, and what it is to answer; both of variance 1 where x
        has `std`."""
        c_in, c_skip, c_out, level = self.scales(sigma, x)
        return c_in * noisy, level, (x - c_skip * noisy) / c_out

    def denoise(
        self, network: Network, noisy: Tensor, sigma: Tensor, cond: Sequence[Tensor]
    ) -> Tensor:
        """D(y), the mean of x given y = x + sigma n, for sigma (N,)."""
        c_in, c_skip, c_out, level = self.scales(sigma, noisy)
        return c_skip * noisy + c_out * network(c_in * noisy, level, *cond).float()

    def sigmas(self, steps: int) -> list[float]:
        """(smax^(1/7) + i / (n - 1) (smin^(1/7) - smax^(1/7)))^7 for i = 0..n-1, then 0."""
        high, low = self.sigma_max ** (1 / 7), self.sigma_min ** (1 / 7)
        shares = [i / max(steps - 1, 1) for i in range(steps)]
        return [(high + share * (low - high)) ** 7 for share in shares] + [0.0]

    def sample(self, network: Network, noise: Tensor, cond: Sequence[Tensor], steps: int) -> Tensor:
        sigmas = self.sigmas(steps)
        x = noise if self.unit_start else noise * self.sigma_max
        for sigma, following in zip(sigmas[:-1], sigmas[1:], strict=True):
            clean = self.denoise(network, x, x.new_full((x.shape[0],), sigma), cond)
            x = clean + (following / sigma) * (x - clean)  # Euler's x + (x - D) / sigma * change
        return x


class Shortcut:
    """Learns steps of 1, 1/2, 1/4 from pairs of steps half as long, the smallest, 1/8, from data.

    `sample` takes 1, 2 or 4 steps.
    """

    levels: ClassVar[int] = 2
    STEPS: ClassVar[tuple[int, ...]] = (1, 2, 4)

    def __init__(self, std: float = 1.0) -> None:
        self.std = std

    def loss(
        self,
        network: Network,
        x: Tensor,
        cond: Sequence[Tensor],
        num_pairs: int,
        draws: Draws | None = None,
    ) -> Tensor:
        draws = Draws.of(x) if draws is None else draws
        tau, halvings = draws.level.unbind(-1)
        pairs = torch.arange(len(x), device=x.device) < num_pairs
        halvings = torch.where(pairs, (halvings * 3).floor(), 3.0)
        size = 2.0**-halvings
        tau = torch.where(pairs, (tau / size).floor() * size, tau)
        noisy = draws.noise + _like(tau, x) * (x - draws.noise)
        # With gradient first: autocast keeps its casts, and those without gradient would be used.
        found = self._predict(network, noisy, tau, halvings, cond)
        target = x
        if num_pairs:
            z, at, size, *told = (v[:num_pairs] for v in (noisy, tau, halvings, *cond))
            target = torch.cat([self._two_steps(network, z, at, size, told), x[num_pairs:]])
        return (0.9 * tau + 0.1) * (found - target).square().flatten(1).mean(1)

    @torch.no_grad()
    def _two_steps(
        self,
        network: Network,
        noisy: Tensor,
        tau: Tensor,
        halvings: Tensor,
        cond: Sequence[Tensor],
    ) -> Tensor:
        """Where z + (1 - tau) (v_1 + v_2) / 2 is: two steps half as long, as one prediction."""
        half = 0.5 * 2.0**-halvings
        first = self._predict(network, noisy, tau, halvings + 1, cond)
        speed = (first - noisy) / _like(1 - tau, noisy)
        middle, later = noisy + _like(half, noisy) * speed, tau + half
        second = self._predict(network, middle, later, halvings + 1, cond)
        speed = 0.5 * (speed + (second - middle) / _like(1 - later, noisy))
        return noisy + _like(1 - tau, noisy) * speed

    def _predict(
        self, network: Network, noisy: Tensor, tau: Tensor, halvings: Tensor, cond: Sequence[Tensor]
    ) -> Tensor:
        return network(noisy, torch.stack([tau, halvings / 3], -1), *cond).float()

    def sample(self, network: Network, noise: Tensor, cond: Sequence[Tensor], steps: int) -> Tensor:
        assert steps in self.STEPS, steps
        x, ones = noise, noise.new_ones(noise.shape[0])
        for i in range(steps):
            clean = self._predict(network, x, ones * (i / steps), ones * math.log2(steps), cond)
            x = x + (clean - x) / (steps - i)  # (clean - x) / (1 - tau) * d
        return x


class LevelEmbedding(nn.Module):
    """Levels (N, L) -> (N, size_out): sines and cosines of 1/4 to 4 periods in a unit."""

    frequencies: Tensor

    def __init__(self, levels: int, num: int = 8) -> None:
        super().__init__()
        self.size_out = 2 * levels * num
        frequencies = 2 * math.pi * torch.logspace(-2, 2, num, base=2)
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(self, level: Tensor) -> Tensor:
        angle = (level.unsqueeze(-1) * self.frequencies).flatten(-2)
        return torch.cat([angle.cos(), angle.sin()], -1)
