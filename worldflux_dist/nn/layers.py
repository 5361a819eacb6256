"""Linear, block-diagonal linear, RMSNorm and MLP, initialised and normalised as DreamerV3 does.

Weights start as a normal cut at two sigma and rescaled so that their standard deviation is
outscale * sqrt(1 / fan_in); biases start at 0 and norm scales at 1. The fan of a block-diagonal
layer is its full input width, not one block's.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worldflux_dist.nn.products import block_linear, linear

CUT_NORMAL_STD = 1.1368  # sigma of the normal that has standard deviation 1 after the cut


def init_weight(weight: Tensor, fan_in: int, outscale: float = 1.0) -> None:
    """Fill `weight` in place: truncated normal, std = outscale * sqrt(1 / fan_in)."""
    sigma = CUT_NORMAL_STD * outscale / math.sqrt(fan_in)
    if sigma == 0:
        nn.init.zeros_(weight)
    else:
        nn.init.trunc_normal_(weight, std=sigma, a=-2 * sigma, b=2 * sigma)


class Linear(nn.Linear):
    """y = x W^T + b with the initialisation above; outscale 0 gives an output of exactly 0."""

    def __init__(self, size_in: int, size_out: int, outscale: float = 1.0) -> None:
        self.outscale = outscale
        super().__init__(size_in, size_out)

    def reset_parameters(self) -> None:
        init_weight(self.weight, self.in_features, self.outscale)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class BlockLinear(nn.Module):
    """Block-diagonal linear: input slice g of `blocks` gives output slice g.

    (..., size_in) -> (..., size_out); weight (blocks, size_in / blocks, size_out / blocks).
    """

    def __init__(self, size_in: int, size_out: int, blocks: int) -> None:
        super().__init__()
        assert size_in % blocks == 0 and size_out % blocks == 0, (size_in, size_out, blocks)
        self.blocks = blocks
        self.weight = nn.Parameter(torch.empty(blocks, size_in // blocks, size_out // blocks))
        self.bias = nn.Parameter(torch.zeros(size_out))
        init_weight(self.weight, size_in)

    def forward(self, x: Tensor) -> Tensor:
        return block_linear(x, self.weight, self.bias)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + 1e-4) * scale over the last axis; no shift."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.scale.shape, self.scale.to(x.dtype), 1e-4)


class NormedLinear(nn.Module):
    """Linear, RMSNorm, SiLU: the layer every MLP here is made of."""

    def __init__(self, size_in: int, size_out: int) -> None:
        super().__init__()
        self.linear = Linear(size_in, size_out)
        self.norm = RMSNorm(size_out)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.norm(self.linear(x)))


class MLP(nn.Sequential):
    """`layers` normed layers of width `units` and, if size_out is given, a plain linear output."""

    def __init__(
        self,
        size_in: int,
        units: int,
        layers: int,
        size_out: int | None = None,
        outscale: float = 1.0,
    ) -> None:
        sizes = [size_in] + [units] * layers
        parts: list[nn.Module] = [
            NormedLinear(a, b) for a, b in zip(sizes[:-1], sizes[1:], strict=True)
        ]
        if size_out is not None:
            parts.append(Linear(sizes[-1], size_out, outscale))
        super().__init__(*parts)


class BinHead(MLP):
    """An MLP with one logit per two-hot bin, zero-initialised: (..., size_in) -> (..., bins + 1).

    The extra last logit is a constant with probability 0: a product with 256 columns is twice as
    fast on a CPU as one with 255.
    """

    def __init__(self, size_in: int, units: int, layers: int, bins: int = 255) -> None:
        super().__init__(size_in, units, layers, bins, outscale=0.0)

    def forward(self, x: Tensor) -> Tensor:
        *layers, out = self
        assert isinstance(out, Linear)
        for layer in layers:
            x = layer(x)
        return linear(x, F.pad(out.weight, (0, 0, 0, 1)), F.pad(out.bias, (0, 1), value=-1e9))
