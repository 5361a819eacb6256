"""The layers and MLPs of all families: dense, block-diagonal, normalised, recurrent, ensembles.

A `Kind` says which norm and activation follow a dense layer and how its weights start. DreamerV3's
(SILU) start as a normal cut at two sigma and rescaled so that their standard deviation is
outscale * sqrt(1 / fan_in), the fan of a block-diagonal layer being its full input width;
TD-MPC2's (MISH, SIMPLEX) as a normal of standard deviation 0.02. Biases start at 0, norm scales at
1. The names of parameters are part of the checkpoint format.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worldflux_dist.nn.activations import mish, simnorm, tanh
from worldflux_dist.nn.forms import for_cpu
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
    """y = x W^T + b. Weights have standard deviation outscale * sqrt(1 / size_in), or are drawn
    from a normal of standard deviation `std` cut at +-2; outscale 0 gives an output of exactly 0.
    """

    def __init__(
        self, size_in: int, size_out: int, outscale: float = 1.0, std: float | None = None
    ) -> None:
        self.outscale, self.std = outscale, std
        super().__init__(size_in, size_out)

    def reset_parameters(self) -> None:
        if self.std is None:
            init_weight(self.weight, self.in_features, self.outscale)
        else:
            nn.init.trunc_normal_(self.weight, std=self.std)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class BinOutput(Linear):
    """Zero-initialised logits of two-hot bins, (..., size_in) -> (..., bins + a few).

    The extra logits have probability 0: a product with a multiple of 8 columns is twice as fast on
    a CPU. Elsewhere there are none.
    """

    def __init__(self, size_in: int, bins: int) -> None:
        super().__init__(size_in, bins, outscale=0.0)

    def forward(self, x: Tensor) -> Tensor:
        if not for_cpu(x):
            return super().forward(x)
        more = -self.out_features % 8
        weight = F.pad(self.weight, (0, 0, 0, more))
        return linear(x, weight, F.pad(self.bias, (0, more), value=-1e9))


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


class Kind(NamedTuple):
    """What makes a layer of an MLP: its norm, its activation, and how its weights start (`std` of
    `Linear`)."""

    norm: Callable[[int], nn.Module]
    activation: Callable[[Tensor], Tensor]
    std: float | None = None


SILU = Kind(RMSNorm, F.silu)  # DreamerV3
MISH, SIMPLEX = Kind(nn.LayerNorm, mish, 0.02), Kind(nn.LayerNorm, simnorm, 0.02)  # TD-MPC2


class NormedLinear(nn.Module):
    """Linear, dropout where asked for, norm, activation: the layer every MLP is made of."""

    def __init__(self, size_in: int, size_out: int, kind: Kind = SILU) -> None:
        super().__init__()
        self.linear = Linear(size_in, size_out, std=kind.std)
        self.norm, self.activation = kind.norm(size_out), kind.activation

    def forward(self, x: Tensor, dropout: float = 0.0) -> Tensor:
        x = self.linear(x)
        return self.activation(self.norm(F.dropout(x, dropout) if dropout else x))


class BlockGRU(nn.Module):
    """DreamerV3's core: block g of the hidden layer reads its slice of deter and all three inputs,
    as one dense product and a batched one. The rows of the inputs that all blocks share are the
    last ones of its weight (in, D).

    With a `span`, units begin by keeping what they hold for 2 to so many steps (Tallec and Ollivier
    2018, "Can recurrent neural networks warp time?", section 3), without for about 4 all of them.
    """

    def __init__(
        self, deter: int, stoch: int, action: int, hidden: int, blocks: int, span: int = 0
    ) -> None:
        super().__init__()
        self.deter, self.blocks = deter, blocks
        self.in_deter = NormedLinear(deter, hidden)
        self.in_stoch = NormedLinear(stoch, hidden)
        self.in_action = NormedLinear(action, hidden)
        self.hid_weight = nn.Parameter(torch.empty(deter // blocks + 3 * hidden, deter))
        self.hid_bias = nn.Parameter(torch.zeros(deter))
        self.hid_norm = RMSNorm(deter)
        self.gates = BlockLinear(deter, 3 * deter, blocks)
        init_weight(self.hid_weight, deter + blocks * 3 * hidden)
        if span:
            with torch.no_grad():
                update = self.gates.bias.view(blocks, 3, -1)[:, 2]  # sigmoid(it - 1) = 1 / steps
                update.uniform_(1, max(1, span - 1)).log_().neg_().add_(1)

    def embed_action(self, action: Tensor) -> Tensor:
        """a / max(1, |a|) -> (..., hidden); independent of the state, so done for all steps."""
        return self.in_action(action / action.detach().abs().clamp(min=1))

    def hidden_weights(self) -> tuple[Tensor, Tensor]:
        """(blocks, D / blocks, D / blocks) for a block's own slice and (D, 3 hidden) for what all
        read. A loop over time takes them once: their gradients are then added up once, too."""
        size = self.deter // self.blocks
        own, shared = self.hid_weight.split([size, len(self.hid_weight) - size])
        return own.view(size, self.blocks, size).transpose(0, 1), shared.t()

    def forward(
        self,
        deter: Tensor,
        stoch: Tensor,
        action: Tensor,
        weights: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """deter (B, D), stoch (B, G * C), embedded action (B, hidden) -> deter (B, D)."""
        return self.step(deter, self.in_stoch(stoch), action, weights)

    def memories(self, stoch: Tensor, action: Tensor, is_first: Tensor) -> Tensor:
        """m_t = forward(m_{t-1}, stoch_{t-1}, a_t), (B, T, D), of stoch (B, T, S) and raw actions
        (B, T, A); zero in the first step of each row and where is_first (B, T). What does not
        depend on the memory is computed for all steps at once."""
        keep = (~is_first).to(stoch.dtype).unsqueeze(-1)
        looked, acted = self.in_stoch(stoch[:, :-1]), self.embed_action(action)
        memory = stoch.new_zeros(len(stoch), self.deter)
        memories, weights = [memory], self.hidden_weights()
        for t in range(1, stoch.shape[1]):
            memory = keep[:, t] * self.step(memory, looked[:, t - 1], acted[:, t], weights)
            memories.append(memory)
        return torch.stack(memories, 1)

    def step(
        self,
        deter: Tensor,
        stoch: Tensor,
        action: Tensor,
        weights: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """As forward, of an embedded stoch (B, hidden), too.

        r, c, u per block; c = tanh(sigmoid(r) * c), u = sigmoid(u - 1),
        deter' = u c + (1 - u) deter
        """
        own, shared = weights or self.hidden_weights()
        inputs = torch.cat([self.in_deter(deter), stoch, action], -1)
        x = block_linear(deter, own, self.hid_bias) + linear(inputs, shared)
        x = self.gates(F.silu(self.hid_norm(x))).unflatten(-1, (self.blocks, 3, -1))
        reset, candidate, update = x.unbind(-2)  # (B, blocks, D / blocks) each
        candidate = tanh(torch.sigmoid(reset) * candidate)
        old = deter.unflatten(-1, (self.blocks, -1))
        new = torch.lerp(old, candidate.to(old.dtype), torch.sigmoid(update - 1).to(old.dtype))
        return new.flatten(-2)


class MLP(nn.Sequential):
    """`layers` normed layers of width `units`, then what `out` makes of that width, if given."""

    def __init__(
        self,
        size_in: int,
        units: int,
        layers: int,
        out: Callable[[int], nn.Module] | None = None,
        kind: Kind = SILU,
    ) -> None:
        sizes = [size_in] + [units] * layers
        parts: list[nn.Module] = [
            NormedLinear(a, b, kind) for a, b in zip(sizes[:-1], sizes[1:], strict=True)
        ]
        super().__init__(*parts, *([out(sizes[-1])] if out else []))


class MishMLP(nn.Module):
    """TD-MPC2's network: two Mish layers, the first with dropout where asked for, and `out`."""

    def __init__(self, size_in: int, units: int, out: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.layers = MLP(size_in, units, 2, kind=MISH)
        self.out = out(units)

    def forward(self, x: Tensor, dropout: float = 0.0) -> Tensor:
        first, second = self.layers
        return self.out(second(first(x, dropout)))


class Ensemble(nn.ModuleList):
    """Networks of one shape. One product after the other: on a CPU faster than batched ones."""

    def __init__(self, num: int, make: Callable[[], MishMLP]) -> None:
        super().__init__(make() for _ in range(num))

    def forward(self, x: Tensor, members: Tensor | None = None, dropout: float = 0.0) -> Tensor:
        """(..., size_in) -> (K, ..., O) of all members, or of those with these numbers.

        Where the numbers cannot be looked at, on a GPU and in compiled code, which must be one
        graph whatever is drawn, all of them are computed.
        """
        unseen = torch.compiler.is_compiling() or not for_cpu(x)
        if members is None or unseen:
            every = torch.stack([member(x, dropout) for member in self])
            return every if members is None else every[members]
        return torch.stack([self[index](x, dropout) for index in members.tolist()])
