"""A U-Net that denoises images of any size, given past frames and a vector of conditions.

Images are padded at their lower right edge by repetition to whole cells of the lowest level, and
the answer is cut back. Channels-first, as convolutions want it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worldflux_dist.nn.denoising import LevelEmbedding
from worldflux_dist.nn.layers import Linear, NormedLinear, init_weight

GROUP = 32  # channels that are normalised together, where there are as many


class Conv(nn.Conv2d):
    """Convolution with an odd kernel that keeps height and width, or with stride 2 halves them."""

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        kernel: int = 3,
        stride: int = 1,
        outscale: float = 1.0,
    ) -> None:
        self.outscale = outscale
        super().__init__(channels_in, channels_out, kernel, stride, padding=kernel // 2)
        # A quarter faster on a CPU; all that follows keeps the layout.
        self.weight.data = self.weight.data.contiguous(memory_format=torch.channels_last)

    def reset_parameters(self) -> None:
        init_weight(self.weight, self.weight[0].numel(), self.outscale)
        assert self.bias is not None
        nn.init.zeros_(self.bias)


class AdaptiveNorm(nn.Module):
    """(1 + scale) groupnorm(x) + shift, with scale and shift from a condition; then SiLU."""

    def __init__(self, channels: int, cond: int) -> None:
        super().__init__()
        self.groups = channels // GROUP if channels % GROUP == 0 else 1
        self.modulation = Linear(cond, 2 * channels, outscale=0.0)

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        scale, shift = self.modulation(cond)[..., None, None].chunk(2, 1)
        return F.silu((1 + scale) * F.group_norm(x, self.groups) + shift)


class Block(nn.Module):
    """x + conv(norm(conv(norm(x)))); a 1x1 convolution of x where channels change."""

    def __init__(self, channels_in: int, channels_out: int, cond: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(AdaptiveNorm(c, cond) for c in (channels_in, channels_out))
        self.convs = nn.ModuleList(Conv(c, channels_out) for c in (channels_in, channels_out))
        same = channels_in == channels_out
        self.skip = nn.Identity() if same else Conv(channels_in, channels_out, 1)

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        y = x
        for norm, conv in zip(self.norms, self.convs, strict=True):
            y = conv(norm(y, cond))
        return self.skip(x) + y


class UNet(nn.Module):
    """(noisy (N, C, H, W), level (N, L), frames (N, F, H, W), cond (N, D)) -> (N, C, H, W).

    A level has `blocks` blocks on the way down and one more on the way up, each of which sees what
    one of the way down, or the level's beginning, has left for it. A fresh net answers 0.
    """

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        cond: int,
        levels: int,
        channels: tuple[int, ...],
        blocks: int,
        units: int,
    ) -> None:
        super().__init__()
        self.multiple = 2 ** (len(channels) - 1)
        self.levels = LevelEmbedding(levels)
        self.cond = nn.Sequential(
            NormedLinear(self.levels.size_out + cond, units), NormedLinear(units, units)
        )
        self.enter = Conv(channels_in, channels[0])
        self.down, self.shrink = nn.ModuleList(), nn.ModuleList()
        self.up, self.grow = nn.ModuleList(), nn.ModuleList()
        left, size = [], channels[0]
        for i, wide in enumerate(channels):
            if i:
                self.shrink.append(Conv(size, size, stride=2))
            left.append([size])
            for _ in range(blocks):
                self.down.append(Block(size, wide, units))
                left[-1].append(size := wide)
        self.middle = nn.ModuleList(Block(size, size, units) for _ in range(2))
        for i, wide in reversed(list(enumerate(channels))):
            for skipped in reversed(left[i]):
                self.up.append(Block(size + skipped, wide, units))
                size = wide
            if i:
                self.grow.append(Conv(size, size))
        self.blocks = blocks
        self.norm, self.leave = AdaptiveNorm(size, units), Conv(size, channels_out, outscale=0.0)

    def forward(self, noisy: Tensor, level: Tensor, frames: Tensor, cond: Tensor) -> Tensor:
        height, width = noisy.shape[-2:]
        x = torch.cat([noisy, frames.to(noisy.dtype)], 1)
        x = F.pad(x, (0, -width % self.multiple, 0, -height % self.multiple), mode="replicate")
        cond = self.cond(torch.cat([self.levels(level), cond], -1))
        x, left = self.enter(x), []
        for i in range(len(self.shrink) + 1):
            x = self.shrink[i - 1](x) if i else x
            left.append(x)
            for block in self.down[i * self.blocks : (i + 1) * self.blocks]:
                left.append(x := block(x, cond))
        for block in self.middle:
            x = block(x, cond)
        for i in range(len(self.grow) + 1):
            x = self.grow[i - 1](F.interpolate(x, scale_factor=2.0)) if i else x
            for block in self.up[i * (self.blocks + 1) : (i + 1) * (self.blocks + 1)]:
                x = block(torch.cat([x, left.pop()], 1), cond)
        return self.leave(self.norm(x, cond))[..., :height, :width]
