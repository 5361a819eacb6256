"""Scalings and output distributions, as plain functions of logits: no distribution objects.

Every function broadcasts over leading axes. What must stay true: bins are exactly antisymmetric,
uniform logits predict exactly 0 (reward and value heads start at zero), and what comes out is
float32 and computed in it, under autocast too: networks may be coarse, what is read off them not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from worldflux_dist.nn.forms import for_cpu
from worldflux_dist.spaces import ActionPart


def symlog(x: Tensor) -> Tensor:
    """sign(x) ln(1 + |x|)"""
    return torch.sign(x) * torch.log1p(torch.abs(x))


def symexp(x: Tensor) -> Tensor:
    """sign(x) (exp(|x|) - 1), the inverse of symlog"""
    return torch.sign(x) * torch.expm1(torch.abs(x))


def symexp_bins(num: int = 255) -> Tensor:
    """`num` bins symexp(linspace(-20, 20)), a half and its exact mirror image."""
    half = symexp(torch.linspace(-20, 0, (num + 1) // 2))
    return torch.cat([half, -half[: num // 2].flip(0)])


def symlog_bins(num: int = 101) -> Tensor:
    """`num` bins linspace(-10, 10) in symlog space. Not to be mixed up with symexp_bins: here
    targets go through symlog and predictions through symexp."""
    half = torch.linspace(-10, 0, (num + 1) // 2)
    return torch.cat([half, -half[: num // 2].flip(0)])


def twohot_predict(logits: Tensor, bins: Tensor) -> Tensor:
    """sum_i p_i b_i in raw space, (..., bins) -> (...); logits beyond the bins do not count.

    Taken as sum_i (p_i - p_-i) b_i over the positive bins: a plain float32 sum of terms up to 5e8
    gives -0.3 for uniform p, this exactly 0.
    """
    probs, half = logits.float().softmax(-1), len(bins) // 2
    more = probs[..., len(bins) - half : len(bins)] - probs[..., :half].flip(-1)
    return (more * bins[len(bins) - half :]).sum(-1)  # no matrix product: autocast would round it


def twohot_target(target: Tensor, bins: Tensor) -> tuple[Tensor, Tensor]:
    """Index (...) of the bin below each target and the weight (...) of the bin above it.

    Linear interpolation in raw space; targets beyond the ends put all weight on the end bin.
    """
    target = target.clamp(bins[0], bins[-1]).contiguous()
    above = torch.searchsorted(bins, target, right=True).clamp(1, len(bins) - 1)
    low, high = bins[above - 1], bins[above]
    return above - 1, (target - low) / (high - low)


def twohot_loss(logits: Tensor, *targets: Tensor, bins: Tensor) -> Tensor:
    """Cross-entropy -sum_i w_i ln p_i of (..., bins) logits to each target (...), summed.

    Several targets for the same logits share one softmax.
    """
    log_probs = logits.float().log_softmax(-1)
    loss = torch.zeros((), device=logits.device)
    for target in targets:
        below, weight = twohot_target(target, bins)
        pair = log_probs.gather(-1, torch.stack([below, below + 1], -1))
        loss = loss - (pair[..., 0] * (1 - weight) + pair[..., 1] * weight)
    return loss


def unimix(logits: Tensor, mix: float = 0.01) -> Tensor:
    """Class probabilities (..., G, C) of which a share `mix` is uniform.

    The softmax runs over an axis that is not the last one: with few classes that is 20 times
    faster on a CPU.
    """
    if not for_cpu(logits):
        return (1 - mix) * logits.float().softmax(-1) + mix / logits.shape[-1]
    turned = logits.float().transpose(-1, -2).contiguous()
    return ((1 - mix) * turned.softmax(-2) + mix / logits.shape[-1]).transpose(-1, -2)


def sample_onehot(probs: Tensor, noise: Tensor) -> Tensor:
    """One-hot sample (..., C) by inversion of uniform noise (...) in [0, 1). No gradient."""
    passed = (noise.unsqueeze(-1) >= probs.detach().cumsum(-1)[..., :-1]).to(probs.dtype)
    return F.pad(passed, (1, 0), value=1.0) - F.pad(passed, (0, 1))


def sample_index(probs: Tensor, noise: Tensor) -> Tensor:
    """As sample_onehot, the index (...) of the class; probs need not add up to 1."""
    passed = probs.detach().cumsum(-1)
    return (noise.unsqueeze(-1) * passed[..., -1:] >= passed[..., :-1]).sum(-1)


def likeliest(x: Tensor) -> Tensor:
    """The one-hot (..., C) of the largest of x, logits or probabilities."""
    return F.one_hot(x.argmax(-1), x.shape[-1]).to(x.dtype)


def straight_through(onehot: Tensor, probs: Tensor) -> Tensor:
    """onehot + p - sg(p): the value of the sample, the gradient of the probabilities."""
    return onehot + (probs - probs.detach())


def kl_onehot(probs: Tensor, other: Tensor) -> Tensor:
    """KL(p || q) of (..., G, C) probabilities, summed over groups and classes -> (...)."""
    return (probs * (probs.log() - other.log())).sum((-1, -2))


def bernoulli_loss(logit: Tensor, target: Tensor) -> Tensor:
    """-t ln sigmoid(l) - (1 - t) ln sigmoid(-l), with soft targets."""
    return F.binary_cross_entropy_with_logits(logit.float(), target, reduction="none")


def normal_log_prob(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """ln N(x; mean, std), summed over the last axis."""
    density = -0.5 * ((x - mean) / std) ** 2 - std.log() - 0.5 * math.log(2 * math.pi)
    return density.sum(-1)


def normal_entropy(std: Tensor) -> Tensor:
    """sum_i ln(std_i sqrt(2 pi e)) over the last axis."""
    return (0.5 * math.log(2 * math.pi) + 0.5 + std.log()).sum(-1)


def action_noise(parts: Sequence[ActionPart], shape: Sequence[int], device: Any) -> Tensor:
    """Draws (*shape, A) that fix a sampled action: standard normal for continuous parts, uniform
    in [0, 1) for discrete ones, which use the first of their entries."""
    draw = {"continuous": torch.randn, "discrete": torch.rand}
    return torch.cat([draw[part.kind](*shape, part.size, device=device) for part in parts], -1)
