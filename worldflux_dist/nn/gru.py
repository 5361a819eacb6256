"""The block GRU of DreamerV3: a recurrent core whose hidden layer and gates are block-diagonal.

The hidden layer stores its weight as (in, D), the rows of the inputs that all blocks share last:
the published function, as one dense product and one batched one.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worldflux_dist.nn.activations import tanh
from worldflux_dist.nn.layers import BlockLinear, NormedLinear, RMSNorm, init_weight
from worldflux_dist.nn.products import block_linear, linear


class BlockGRU(nn.Module):
    """Block g of the hidden layer reads its slice of deter and all three inputs."""

    def __init__(self, deter: int, stoch: int, action: int, hidden: int, blocks: int) -> None:
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
        """deter (B, D), stoch (B, G * C), embedded action (B, hidden) -> deter (B, D).

        r, c, u per block; c = tanh(sigmoid(r) * c), u = sigmoid(u - 1),
        deter' = u c + (1 - u) deter
        """
        own, shared = weights or self.hidden_weights()
        inputs = torch.cat([self.in_deter(deter), self.in_stoch(stoch), action], -1)
        x = block_linear(deter, own, self.hid_bias) + linear(inputs, shared)
        x = self.gates(F.silu(self.hid_norm(x))).unflatten(-1, (self.blocks, 3, -1))
        reset, candidate, update = x.unbind(-2)  # (B, blocks, D / blocks) each
        candidate = tanh(torch.sigmoid(reset) * candidate)
        old = deter.unflatten(-1, (self.blocks, -1))
        new = torch.lerp(old, candidate.to(old.dtype), torch.sigmoid(update - 1).to(old.dtype))
        return new.flatten(-2)
