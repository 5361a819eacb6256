"""LayerNorm-Mish networks, ensembles of them, and SimNorm: what TD-MPC2 is made of.

Weights start as a normal of standard deviation 0.02, biases at 0, norm scales at 1. Mish and
SimNorm are written out because a CPU runs these forms three and ten times faster than torch's own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worldflux_dist.nn.products import linear

GROUP = 8  # entries that share one softmax in SimNorm


class _Mish(torch.autograd.Function):
    """x tanh(softplus(x)) = x (1 - r) / (1 + r) with q = sigmoid(-x), r = q^2, and its derivative
    (1 - r) / (1 + r) + 4 x (1 - q) r / (1 + r)^2. No exponential can overflow."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        q = torch.neg(x).sigmoid_()
        ctx.save_for_backward(x, q)
        r = q * q
        return (1 - r).mul_(x).div_(r.add_(1))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        x, q = ctx.saved_tensors
        r = q * q
        a = (r + 1).reciprocal_()
        bent = (1 - q).mul_(r).mul_(x).mul_(a)
        return torch.add(1 - r, bent, alpha=4).mul_(a).mul_(grad)


def mish(x: Tensor) -> Tensor:
    """x tanh(ln(1 + e^x)), element by element."""
    if x.requires_grad:
        return _Mish.apply(x)
    q = torch.neg(x).sigmoid_()
    r = q.mul_(q)
    return (1 - r).mul_(x).div_(r.add_(1))


def simnorm(x: Tensor) -> Tensor:
    """Softmax over groups of 8 neighbours of the last axis: entries >= 0, group sums 1."""
    weights = x.float().clamp(-80, 80).exp()  # after a LayerNorm no entry is large
    ones = torch.ones(GROUP, GROUP, device=x.device)
    with torch.autocast(x.device.type if not x.is_meta else "cpu", enabled=False):
        totals = weights.unflatten(-1, (-1, GROUP)) @ ones  # the sum, already in every column
    return weights / totals.flatten(-2)


def init_weight(weight: Tensor, zero: bool = False) -> None:
    """Fill in place: normal of standard deviation 0.02 cut at +-2, or zeros."""
    if zero:
        nn.init.zeros_(weight)
    else:
        nn.init.trunc_normal_(weight, std=0.02)


class Linear(nn.Linear):
    """y = x W^T + b with the initialisation above; `zero` gives an output of exactly 0."""

    def __init__(self, size_in: int, size_out: int, zero: bool = False) -> None:
        self.zero = zero
        super().__init__(size_in, size_out)

    def reset_parameters(self) -> None:
        init_weight(self.weight, self.zero)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class BinOutput(Linear):
    """Zero-initialised logits of two-hot bins, (..., size_in) -> (..., bins + a few).

    The extra logits have probability 0: a product with a multiple of 8 columns is faster.
    """

    def __init__(self, size_in: int, bins: int) -> None:
        super().__init__(size_in, bins, zero=True)

    def forward(self, x: Tensor) -> Tensor:
        more = -self.out_features % 8
        weight = F.pad(self.weight, (0, 0, 0, more))
        return linear(x, weight, F.pad(self.bias, (0, more), value=-1e9))


class NormedLinear(nn.Module):
    """Linear, dropout where asked for, LayerNorm, then Mish or SimNorm."""

    def __init__(self, size_in: int, size_out: int, simplex: bool = False) -> None:
        super().__init__()
        self.linear = Linear(size_in, size_out)
        self.norm = nn.LayerNorm(size_out)
        self.activation = simnorm if simplex else mish

    def forward(self, x: Tensor, dropout: float = 0.0) -> Tensor:
        x = self.linear(x)
        return self.activation(self.norm(F.dropout(x, dropout) if dropout else x))


class MLP(nn.Module):
    """Normed Mish layers of the given `units`, then the layer `out`: (..., size_in) -> (..., O).

    Dropout, where asked for, is in the first layer only.
    """

    def __init__(self, size_in: int, units: Sequence[int], out: Callable[[int], nn.Module]) -> None:
        super().__init__()
        sizes = [size_in, *units]
        self.layers = nn.ModuleList(
            NormedLinear(a, b) for a, b in zip(sizes[:-1], sizes[1:], strict=True)
        )
        self.out = out(sizes[-1])

    def forward(self, x: Tensor, dropout: float = 0.0) -> Tensor:
        for number, layer in enumerate(self.layers):
            x = layer(x, 0.0 if number else dropout)
        return self.out(x)


class Ensemble(nn.ModuleList):
    """MLPs of one shape. One product after the other: on a CPU faster than batched ones."""

    def __init__(self, num: int, make: Callable[[], MLP]) -> None:
        super().__init__(make() for _ in range(num))

    def forward(
        self, x: Tensor, members: Sequence[int] | None = None, dropout: float = 0.0
    ) -> Tensor:
        """(..., size_in) -> (K, ..., O) of all members, or of the K named ones only."""
        chosen = self if members is None else [self[index] for index in members]
        return torch.stack([member(x, dropout) for member in chosen])
