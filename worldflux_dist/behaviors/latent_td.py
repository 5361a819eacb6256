"""TD-MPC2's behavior: an ensemble of Qs by temporal differences, and a policy that ascends them.

    target = r + discount (1 - terminal) min over 2 random target Qs of Q'(z', a'),  a' ~ pi(z')
    value:   mean over k, Qs of w_{k-1} CE(Q(z_{k-1}, a_k), target_k)      z along the path
    policy: -mean over k of w_k (mean of 2 random Qs(z_k, a) / S + eta H),  a ~ pi(z_k)

with z' seen, not predicted; w what the model says a step of its path counts (TD-MPC2: rho^k); S a
moving average of max(1, P95 - P5) of the Qs where that is 1; H the scaled entropy -n ln N(noise)
of a Box of n numbers, which leaves the squashing out. The value loss reaches into the
model; the policy learns apart, on detached states, with its own optimizer, once the model and the
Qs have stepped. Continuous parts of an action are squashed Gaussians.

Discrete actions are an extension: categoricals over one-hots. A single one is averaged over
exactly, sum_a pi(a) Q(z, a); several, or a mixture, by straight-through samples.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from annotated_types import Ge, Le, Lt
from torch import Tensor

from worldflux_dist.behaviors import returns
from worldflux_dist.behaviors.base import Behavior, BehaviorLoss
from worldflux_dist.models.base import LossOutput, WorldModel
from worldflux_dist.nn import distributions as dist
from worldflux_dist.nn.layers import BinOutput, Ensemble, Linear, MishMLP
from worldflux_dist.nn.optim import ClippedAdam
from worldflux_dist.settings import Positive, Scale, Settings, Share
from worldflux_dist.spaces import ActionPart


@dataclass(frozen=True)
class LatentTDConfig(Settings):
    """The published constants; num_q is the size preset's."""

    section: ClassVar[str] = "behavior"

    num_q: Annotated[int, Ge(2), Le(1000)] = 5
    dropout: Annotated[float, Ge(0), Lt(1)] = 0.01
    target_rate: Share = 0.01
    value_scale: Scale = 0.1
    entropy_scale: Scale = 1e-4
    scale_rate: Share = 0.01
    log_std_min: Annotated[float, Ge(-100), Le(100)] = -10.0
    log_std_max: Annotated[float, Ge(-100), Le(100)] = 2.0
    learning_rate: Positive = 3e-4
    clip: Positive = 20.0


class QDraw(NamedTuple):
    """The random draws of one value: noise of the policy (..., A) and which two Qs are asked."""

    action: Tensor | None
    pair: Tensor


class Policy(NamedTuple):
    """Actions (..., A), their scaled entropy (...), and their log-probability (...)."""

    action: Tensor
    entropy: Tensor
    log_prob: Tensor


class LatentTD(Behavior):
    """Policy prior, Qs, target Qs and the scale of Qs. The target Qs have no gradient."""

    Config, pieces = LatentTDConfig, ("loss", "policy_loss")
    bins: Tensor
    scale: Tensor

    def __init__(
        self, feature_dim: int, width: int, parts: tuple[ActionPart, ...], config: LatentTDConfig
    ) -> None:
        super().__init__()
        self.config, self.parts = config, parts
        self.action_dim = sum(part.size for part in parts)
        self.outs = [part.size * (1 if part.kind == "discrete" else 2) for part in parts]
        out = partial(Linear, size_out=sum(self.outs), std=0.02)
        self.actor = MishMLP(feature_dim, width, out)
        bins = partial(BinOutput, bins=101)
        size_in = feature_dim + self.action_dim
        self.qs = Ensemble(config.num_q, lambda: MishMLP(size_in, width, bins))
        self.target_qs = copy.deepcopy(self.qs).requires_grad_(False)
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("bins", dist.symlog_bins(101), persistent=False)
        self.loss_scales = {"value": config.value_scale}

    def inference_modules(self, planning: bool = False) -> tuple[str, ...]:
        return ("actor", "qs") if planning else ("actor",)

    # --------------------------------------------------------------------------------- policy

    def policy(self, features: Tensor, noise: Tensor | None = None, greedy: bool = False) -> Policy:
        """Sampled actions with gradient; `noise` (..., A) as `dist.action_noise` draws it. With
        `greedy` the likeliest ones."""
        raw = self.actor(features).float()
        if greedy:
            noise = raw.new_zeros(*raw.shape[:-1], self.action_dim)
        elif noise is None:
            noise = dist.action_noise(self.parts, raw.shape[:-1], raw.device)
        actions: list[Tensor] = []
        entropy = log_prob = torch.zeros(raw.shape[:-1], device=raw.device)
        draws = noise.split([part.size for part in self.parts], -1)
        for part, logits, draw in zip(self.parts, raw.split(self.outs, -1), draws, strict=True):
            if part.kind == "discrete":
                probs, logs = logits.softmax(-1), logits.log_softmax(-1)
                sampled = dist.sample_onehot(probs, draw[..., 0])
                onehot = dist.likeliest(logits) if greedy else sampled
                actions.append(dist.straight_through(onehot, probs))
                entropy = entropy - (probs * logs).sum(-1)
                log_prob = log_prob + (onehot * logs).sum(-1)
            else:
                mean, log_std = self.gaussian(logits)
                actions.append(torch.tanh(mean if greedy else mean + draw * log_std.exp()))
                gaussian = -0.5 * draw**2 - log_std - 0.5 * math.log(2 * math.pi)
                entropy = entropy - part.size * gaussian.sum(-1)
                squashing = torch.log(F.relu(1 - actions[-1] ** 2) + 1e-6)
                log_prob = log_prob + (gaussian - squashing).sum(-1)
        return Policy(torch.cat(actions, -1), entropy, log_prob)

    def gaussian(self, raw: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log std = min + (max - min) / 2 (tanh x + 1), both (..., A), before tanh."""
        mean, x = raw.chunk(2, -1)
        low, high = self.config.log_std_min, self.config.log_std_max
        return mean, low + 0.5 * (high - low) * (torch.tanh(x) + 1)

    def act(self, features: Tensor, greedy: bool = False, noise: Tensor | None = None) -> Tensor:
        return self.policy(features, noise, greedy).action

    # --------------------------------------------------------------------------------- values

    def q(self, features: Tensor, action: Tensor, pair: Tensor, dropout: float = 0.0) -> Tensor:
        """Expected returns (2, ...) of the two named Qs."""
        logits = self.qs(torch.cat([features, action], -1), pair, dropout)
        return dist.symexp(dist.twohot_predict(logits, self.bins))

    def value(self, features: Tensor, noise: Any = None) -> Tensor:
        draw = noise or self.value_noise(features.shape[:-1], features.device)
        return self.q(features, self.act(features, noise=draw.action), draw.pair).mean(0)

    def expected_value(self, features: Tensor) -> Tensor:
        """The mean of all Qs at the likeliest action."""
        every = torch.arange(self.config.num_q, device=features.device)
        return self.q(features, self.act(features, greedy=True), every).mean(0)

    def value_noise(self, shape: Sequence[int], device: Any) -> QDraw:
        num = self.config.num_q
        # Not [:2]: torch.compile (2.13) takes that for part of a pattern of its own, and fails.
        pair = torch.randperm(num, device=device).split([2, num - 2])[0]
        return QDraw(dist.action_noise(self.parts, shape, device), pair)

    @torch.no_grad()
    def target(
        self, features: Tensor, reward: Tensor, going: Tensor, noise: QDraw | None = None
    ) -> Tensor:
        """r + going min of two target Qs at a ~ pi (...); `going` contains the discount."""
        draw = noise or self.value_noise(features.shape[:-1], features.device)
        action = self.policy(features, draw.action).action
        logits = self.target_qs(torch.cat([features, action], -1), draw.pair)
        return reward + going * dist.symexp(dist.twohot_predict(logits, self.bins)).amin(0)

    # --------------------------------------------------------------------------------- losses

    def loss(
        self, world_model: WorldModel, output: LossOutput, noise: QDraw | None = None
    ) -> BehaviorLoss:
        """The value loss (num_q, B, T - 1) along the path; steps into a reset have none."""
        c, batch = self.config, output.batch
        path = world_model.features(output.path)
        going = world_model.discount * (1 - batch.is_terminal[:, 1:].float())
        seen = world_model.features(output.states).detach()[:, 1:]
        target = self.target(seen, batch.reward[:, 1:], going, noise)
        logits = self.qs(torch.cat([path[:, :-1], batch.action[:, 1:]], -1), dropout=c.dropout)
        weight = (~batch.is_first[:, 1:]).float() * output.weight[:-1]
        wanted = dist.symlog(target).expand(logits.shape[:-1])
        loss = weight * dist.twohot_loss(logits, wanted, bins=self.bins)
        start = (path.detach(), output.weight)
        return BehaviorLoss({"value": loss}, {"value_target": target.mean()}, start)

    def policy_optimizer(self) -> ClippedAdam:
        c = self.config
        return ClippedAdam(self.actor.parameters(), c.learning_rate, c.clip, eps=1e-5)

    def policy_loss(
        self, features: Tensor, weight: Tensor, noise: QDraw | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The policy loss () on states (B, T, F), from the Qs as they are now, with dropout."""
        c = self.config
        draw = noise or self.value_noise(features.shape[:-1], features.device)
        policy = self.policy(features, draw.action)
        q = self._expected_q(features, policy.action, draw.pair)
        scaled = q / self.update_scale(torch.where(weight == 1, q.detach(), torch.nan))
        loss = -(weight * (scaled + c.entropy_scale * policy.entropy)).mean()
        metrics = {
            "policy_entropy": -policy.log_prob.mean().detach(),
            "policy_entropy_scaled": policy.entropy.mean().detach(),
            "q": q.mean().detach(),
            "q_scale": self.scale.clone(),
        }
        return loss, metrics

    def _expected_q(self, features: Tensor, action: Tensor, pair: Tensor) -> Tensor:
        """Mean of two Qs (...) at the action or, for a single discrete one, averaged over all."""
        dropout = self.config.dropout
        if len(self.parts) > 1 or self.parts[0].kind != "discrete":
            return self.q(features, action, pair, dropout).mean(0)
        num = self.action_dim
        choices = torch.eye(num, device=features.device).expand(*features.shape[:-1], num, num)
        each = features.unsqueeze(-2).expand(*choices.shape[:-1], -1)
        q = self.q(each, choices, pair, dropout).mean(0)  # (..., actions)
        return (self.actor(features).float().softmax(-1) * q.detach()).sum(-1)

    @torch.no_grad()
    def update_scale(self, q: Tensor) -> Tensor:
        """S <- S + rate (max(1, P95 - P5) - S) of Qs of any shape, all ranks'; gives S ().

        NaN where a Q does not count: a choice of them would have a shape that is not known before.
        """
        low, high = returns.percentiles(q, 5, 95)
        spread = (high - low).clamp(min=1)
        # A broken batch stops the run; it must not break the average that is saved.
        self.scale.lerp_(torch.where(spread.isfinite(), spread, self.scale), self.config.scale_rate)
        return self.scale

    @torch.no_grad()
    def update_targets(self) -> None:
        """target <- target_rate * Q + (1 - target_rate) * target, after every gradient step."""
        torch._foreach_lerp_(
            list(self.target_qs.parameters()), list(self.qs.parameters()), self.config.target_rate
        )
