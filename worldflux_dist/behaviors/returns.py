"""The equations of value learning: lambda-returns, return normalisation, policy and value losses.

Everything is time-major: element t of `rewards`, `continues` and `bootstraps` belongs to state
t + 1, element t of the result to state t.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from worldflux_dist.nn.distributions import twohot_loss


def lambda_return(
    rewards: Tensor, continues: Tensor, bootstraps: Tensor, lambda_: float | Tensor
) -> Tensor:
    """R_t = r_{t+1} + c_{t+1} [(1 - lam) V_{t+1} + lam R_{t+1}],  R_H = V_H.

    All (H, ...) -> (H, ...). `continues` contains the discount; a lambda_ tensor (H, ...) cuts
    the return where it is 0 and bootstraps there.
    """
    # Made where the rewards are: a GPU's host must not wait to send a number.
    lambdas = lambda_ if isinstance(lambda_, Tensor) else torch.full_like(rewards, lambda_)
    fixed = rewards + continues * (1 - lambdas) * bootstraps
    decay = continues * lambdas
    result = torch.empty_like(rewards)
    follow = bootstraps[-1]
    for t in range(len(rewards) - 1, -1, -1):
        follow = fixed[t] + decay[t] * follow
        result[t] = follow
    return result


def percentiles(x: Tensor, low: float, high: float) -> Tensor:
    """Two percentiles of x, of any shape, of all ranks of a learner group. NaNs do not count."""
    x = x.detach().float().flatten()
    if dist.is_available() and dist.is_initialized():
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x)
        x = torch.cat(parts)
    # Both numbers made where x is: a GPU's host must not wait to send them.
    return torch.nanquantile(x, torch.linspace(low / 100, high / 100, 2, device=x.device))


class ReturnNormalizer(nn.Module):
    """scale = max(1, P95 - P5) with moving averages of both percentiles, not debiased.

    The average is updated before use and the maximum is taken after it.
    """

    low: Tensor
    high: Tensor

    def __init__(self, rate: float = 0.01) -> None:
        super().__init__()
        self.rate = rate
        self.register_buffer("low", torch.zeros(()))
        self.register_buffer("high", torch.zeros(()))

    @torch.no_grad()
    def update(self, returns: Tensor) -> Tensor:
        """Take in returns of any shape, those of all ranks; gives the scale ()."""
        low, high = percentiles(returns, 5, 95)
        # A broken batch stops the run; it must not break the average that is saved.
        self.low.lerp_(torch.where(low.isfinite(), low, self.low), self.rate)
        self.high.lerp_(torch.where(high.isfinite(), high, self.high), self.rate)
        return (self.high - self.low).clamp(min=1)


def policy_loss(
    log_prob: Tensor, entropy: Tensor, advantage: Tensor, weight: Tensor, entropy_scale: float
) -> Tensor:
    """-w_t (ln pi(a_t) sg(A_t) + eta H_t): REINFORCE for every kind of action, all (H, N)."""
    return -weight * (log_prob * advantage.detach() + entropy_scale * entropy)


def value_loss(
    logits: Tensor, returns: Tensor, slow_value: Tensor, weight: Tensor, bins: Tensor
) -> Tensor:
    """w_t (CE(v_t, R_t) + CE(v_t, slow_t)) for logits (H, N, bins), the rest (H, N)."""
    return weight * twohot_loss(logits, returns.detach(), slow_value.detach(), bins=bins)
