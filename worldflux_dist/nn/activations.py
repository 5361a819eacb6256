"""Activations, written out where a CPU computes (forms.py). All but mish give float32, whatever
they are given.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from worldflux_dist.nn.forms import for_cpu
from worldflux_dist.nn.products import full_precision

GROUP = 8  # entries that share one softmax in SimNorm


def tanh(x: Tensor) -> Tensor:
    """2 sigmoid(2 x) - 1"""
    if not for_cpu(x):
        return torch.tanh(x.float())
    return 2 * torch.sigmoid(2 * x.float()) - 1


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
    if not for_cpu(x):
        return F.mish(x)
    if x.requires_grad:
        return _Mish.apply(x)
    q = torch.neg(x).sigmoid_()
    r = q.mul_(q)
    return (1 - r).mul_(x).div_(r.add_(1))


def simnorm(x: Tensor) -> Tensor:
    """Softmax over groups of 8 neighbours of the last axis: entries >= 0, group sums 1."""
    if not for_cpu(x):
        return x.float().unflatten(-1, (-1, GROUP)).softmax(-1).flatten(-2)
    weights = x.float().clamp(-80, 80).exp()  # after a LayerNorm no entry is large
    ones = torch.ones(GROUP, GROUP, device=x.device)
    with full_precision(x):
        totals = weights.unflatten(-1, (-1, GROUP)) @ ones  # the sum, already in every column
    return weights / totals.flatten(-2)
