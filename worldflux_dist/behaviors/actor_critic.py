"""Actor-critic learned in imagination: DreamerV3's behavior, over any family's features.

The rollout is imagined without gradient from detached posteriors; the policy learns by REINFORCE
and the critic by two-hot cross-entropy on lambda-returns. A third loss teaches the critic on the
replayed steps themselves, and its gradient does reach the world model where both learn together.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Ge, Le
from torch import Tensor, nn

from worldflux_dist.behaviors import returns
from worldflux_dist.behaviors.base import Behavior, BehaviorLoss, Imagined
from worldflux_dist.models.base import LossOutput, Rollout, State, WorldModel
from worldflux_dist.nn import distributions as dist
from worldflux_dist.nn.layers import MLP, BinOutput, Linear
from worldflux_dist.settings import Layers, Scale, Settings, Share
from worldflux_dist.spaces import ActionPart


@dataclass(frozen=True)
class ActorCriticConfig(Settings):
    """The published constants."""

    section: ClassVar[str] = "behavior"

    horizon: Annotated[int, Ge(1), Le(10_000)] = 15
    lambda_: Share = 0.95
    entropy_scale: Scale = 3e-4
    layers: Layers = 3
    slow_rate: Share = 0.02
    return_rate: Share = 0.01
    replay_value_scale: Scale = 0.3


class Actor(nn.Module):
    """Features (..., F) -> a distribution over flat actions: categoricals for one-hot parts,
    Normal(tanh m, 0.9 sigmoid(s + 2) + 0.1) for continuous ones, clipped only by the env."""

    def __init__(
        self, size_in: int, units: int, layers: int, parts: tuple[ActionPart, ...]
    ) -> None:
        super().__init__()
        self.parts, self.sizes = parts, [part.size for part in parts]
        self.mlp = MLP(size_in, units, layers)
        self.heads = nn.ModuleList(
            Linear(units, part.size, outscale=0.01)
            for part in parts
            for _ in range(1 if part.kind == "discrete" else 2)
        )

    def forward(self, features: Tensor) -> list[tuple[Tensor, ...]]:
        """Per action part: (logits,) or (mean, std), float32."""
        x = self.mlp(features)
        outs = iter([head(x).float() for head in self.heads])
        return [
            (next(outs),)
            if part.kind == "discrete"
            else (torch.tanh(next(outs)), 0.9 * torch.sigmoid(next(outs) + 2) + 0.1)
            for part in self.parts
        ]

    def sample(
        self, policy: list[tuple[Tensor, ...]], greedy: bool = False, noise: Tensor | None = None
    ) -> Tensor:
        """Flat actions (..., A); `greedy` takes the most probable one, `noise` (..., A) fixes the
        draws (see `dist.action_noise`)."""
        chosen = []
        draws = [None] * len(self.parts) if noise is None else noise.split(self.sizes, -1)
        for (first, *std), draw in zip(policy, draws, strict=True):
            if greedy:
                chosen.append(first if std else dist.likeliest(first))
            elif std:
                normal = torch.randn_like(first) if draw is None else draw
                chosen.append(first + std[0] * normal)
            else:
                shape, device = first.shape[:-1], first.device
                uniform = torch.rand(shape, device=device) if draw is None else draw[..., 0]
                chosen.append(dist.sample_onehot(first.softmax(-1), uniform))
        return torch.cat(chosen, -1)

    def log_prob_and_entropy(
        self, policy: list[tuple[Tensor, ...]], action: Tensor
    ) -> tuple[Tensor, Tensor]:
        """ln pi(a) and entropy (...), summed over the parts of flat actions (..., A)."""
        log_prob = torch.zeros(action.shape[:-1], device=action.device)
        entropy = torch.zeros_like(log_prob)
        pieces = action.split(self.sizes, -1)
        for params, piece in zip(policy, pieces, strict=True):
            if len(params) == 2:
                log_prob = log_prob + dist.normal_log_prob(piece, *params)
                entropy = entropy + dist.normal_entropy(params[1])
            else:
                logs = params[0].log_softmax(-1)
                log_prob = log_prob + (logs * piece).sum(-1)
                entropy = entropy - (logs.exp() * logs).sum(-1)
        return log_prob, entropy


class ActorCritic(Behavior):
    """Policy, critic, slow critic and return normaliser. The slow critic has no gradient. A `twin`
    (coarse.py) imagines where there is one."""

    Config, pieces = ActorCriticConfig, ("imagined_loss",)
    bins: Tensor
    twin: tuple[WorldModel, ActorCritic] | None = None

    def __init__(
        self, feature_dim: int, width: int, parts: tuple[ActionPart, ...], config: ActorCriticConfig
    ) -> None:
        super().__init__()
        self.config = config
        self.actor = Actor(feature_dim, width, config.layers, parts)
        self.critic = MLP(feature_dim, width, config.layers, partial(BinOutput, bins=255))
        self.slow_critic = copy.deepcopy(self.critic).requires_grad_(False)
        self.normalizer = returns.ReturnNormalizer(config.return_rate)
        self.register_buffer("bins", dist.symexp_bins(255), persistent=False)
        self.loss_scales = {"replay_value": config.replay_value_scale}

    def act(self, features: Tensor, greedy: bool = False, noise: Tensor | None = None) -> Tensor:
        return self.actor.sample(self.actor(features), greedy, noise)

    def value(self, features: Tensor, noise: Any = None) -> Tensor:
        return self._predict(self.critic(features))

    def inference_modules(self, planning: bool = False) -> tuple[str, ...]:
        return ("actor", "critic") if planning else ("actor",)

    def log_prob(self, features: Tensor, actions: Tensor) -> Tensor:
        """ln pi(a) (...) of flat actions (..., A) at features (..., F)."""
        return self.actor.log_prob_and_entropy(self.actor(features), actions)[0]

    @torch.no_grad()
    def imagine(self, world_model: WorldModel, start: State, horizon: int | None = None) -> Rollout:
        """Roll the policy from start (N, ...) for `horizon` steps, without gradient."""
        horizon = self.config.horizon if horizon is None else horizon
        model, behavior = self.twin or (world_model, self)
        rollout = model.rollout(start.detach(), behavior.act, horizon)
        if not torch.compiler.is_compiling():  # compiled code keeps no casts
            # Weights cast without gradient must not be reused where gradient is wanted.
            torch.clear_autocast_cache()
        return rollout

    def loss(
        self, world_model: WorldModel, output: LossOutput, rollout: Rollout | None = None
    ) -> BehaviorLoss:
        """The losses below, imagined from every posterior; that on replayed steps has gradient into
        the model."""
        if rollout is None:
            rollout = self.imagine(world_model, output.states.flatten())
        imagined = Imagined.of(world_model, rollout, output.batch)
        path = world_model.features(output.path)
        return self.imagined_loss(imagined, world_model.discount, path)

    def imagined_loss(
        self, imagined: Imagined, discount: float, path: Tensor | None = None
    ) -> BehaviorLoss:
        """Policy and value (H, N) on what was imagined from N = B * T states, and replay_value
        (T - 1, B) on the replayed steps: their features `path` (B, T, F), which may carry gradient
        into the world model, or without it those that imagination started from.

        Where `imagined.log_prob` says that an older policy mu acted, the policy loss is weighed by
        min(1, pi / mu), as in IMPALA (Espeholt et al. 2018). Without it, actions that the policy
        has given up would be pushed away for ever, until it is certain of the rest.
        """
        c, features, shape = self.config, imagined.features, imagined.reward.shape
        path = features[0].unflatten(0, shape) if path is None else path
        logits, policy = self.critic(features[:-1]), self.actor(features[:-1])

        # lambda-returns R_t of the imagined states, and what a state counts: that it is reached
        with torch.no_grad():
            value = torch.cat([self._predict(logits), self.value(features[-1:])])
            rewards, going = imagined.rewards, imagined.continues
            target = returns.lambda_return(rewards, going, value[1:], c.lambda_)
            weight = torch.cat([imagined.start_continue[None], going[:-1]]).cumprod(0)
            scale = self.normalizer.update(target)
            advantage = (target - value[:-1]) / scale

        # actor: REINFORCE with the normalised advantage, and an entropy bonus
        log_prob, entropy = self.actor.log_prob_and_entropy(policy, imagined.actions)
        if imagined.log_prob is not None:
            advantage *= (log_prob.detach() - imagined.log_prob).exp().clamp(max=1)
        actor = returns.policy_loss(log_prob, entropy, advantage, weight, c.entropy_scale)

        # critic: towards R_t, and towards the slow critic
        slow = self._slow_value(features[:-1])
        critic = returns.value_loss(logits, target, slow, weight, self.bins)

        # critic on replayed steps, whose rewards are real: every bootstrap, intermediate ones too,
        # is the imagined return of that state; nothing is learned on a step that ends an episode
        last, terminal = imagined.is_last.float().t(), imagined.is_terminal.float().t()
        replayed = returns.lambda_return(
            imagined.reward.t()[1:],
            discount * (1 - terminal[1:]),
            target[0].unflatten(0, shape).t()[1:],
            c.lambda_ * (1 - last[1:]),
        )
        steps = path.transpose(0, 1)[:-1]  # (T - 1, B, F)
        replay_critic = returns.value_loss(
            self.critic(steps), replayed, self._slow_value(steps), 1 - last[:-1], self.bins
        )

        metrics = {
            "return_imagined": target.mean(),
            "return_scale": scale,
            "value": value.mean(),
            "policy_entropy": entropy.mean().detach(),
            "reward_imagined": rewards.mean(),
        }
        losses = {"policy": actor, "value": critic, "replay_value": replay_critic}
        return BehaviorLoss(losses, metrics)

    def _predict(self, logits: Tensor) -> Tensor:
        return dist.twohot_predict(logits, self.bins)

    @torch.no_grad()
    def _slow_value(self, features: Tensor) -> Tensor:
        return self._predict(self.slow_critic(features))

    @torch.no_grad()
    def update_targets(self) -> None:
        """slow <- slow_rate * critic + (1 - slow_rate) * slow, after every gradient step."""
        slow, critic = self.slow_critic.parameters(), self.critic.parameters()
        torch._foreach_lerp_(list(slow), list(critic), self.config.slow_rate)
