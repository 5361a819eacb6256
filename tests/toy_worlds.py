"""A package from outside: a family of one linear layer and a behavior, as a stranger writes them.

tests/test_plugins.py installs it into a folder of its own; nothing here imports it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from worldflux_dist.behaviors.actor_critic import ActorCritic, ActorCriticConfig
from worldflux_dist.data import Batch
from worldflux_dist.models.base import LossOutput, Prediction, State, WorldModel
from worldflux_dist.nn.optim import LaProp
from worldflux_dist.settings import Count, Settings, Units
from worldflux_dist.spaces import Spaces


@dataclass(frozen=True)
class ToyConfig(Settings):
    section: ClassVar[str] = "model_options"

    units: Units = 16


PRESETS = {"tiny": ToyConfig()}


class Model(WorldModel):
    """The next observation is a linear function of this one and the action."""

    def __init__(self, spaces: Spaces, config: ToyConfig) -> None:
        super().__init__(spaces)
        self.size = spaces.obs["obs"].shape[0]
        self.feature_dim, self.width, self.discount = self.size + 1, config.units, 0.99
        self.next = nn.Linear(self.size + spaces.action_dim, self.size + 1)
        self.loss_scales = {"dynamics": 1.0}
        self.native = {"behavior": {"kind": "brief"}, "planner": {"method": "none"}}

    def optimizer(self, params: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
        return LaProp(params, lr=1e-3, warmup=0)

    def inference_modules(self, planning: bool = False) -> tuple[str, ...]:
        return ("next",)

    def initial(self, batch_size: int) -> State:
        return State({"obs": self.next.weight.new_zeros(batch_size, self.size + 1)})

    def update(
        self,
        state: State,
        action: Tensor,
        obs: Any,
        is_first: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> State:
        reward = self.transition(state, action).tensors["obs"][:, -1:]
        if is_first is not None:
            reward = reward * (~is_first).float().unsqueeze(-1)
        return State({"obs": torch.cat([self.tensors(obs)["obs"], reward], -1)})

    def transition(self, state: State, action: Tensor, noise: Tensor | None = None) -> State:
        before = state.tensors["obs"][..., :-1]
        return State({"obs": self.next(torch.cat([before, action], -1))})

    def decode(
        self, state: State, heads: Sequence[str] = ("obs", "reward", "continue")
    ) -> Prediction:
        x = state.tensors["obs"]
        preds = {
            "obs": x[..., :-1],
            "reward": x[..., -1],
            "continue": 0.99 * torch.ones_like(x[..., 0]),
        }
        return Prediction({name: preds[name] for name in heads})

    def features(self, state: State) -> Tensor:
        return state.tensors["obs"]

    def loss(
        self, batch: Batch, start: State | None = None, noise: Tensor | None = None
    ) -> LossOutput:
        states = State({"obs": torch.cat([batch.obs["obs"], batch.reward.unsqueeze(-1)], -1)})
        after = self.transition(states[:, :-1], batch.action[:, 1:]).tensors["obs"]
        keep = (~batch.is_first[:, 1:]).float()
        error = (after - states.tensors["obs"][:, 1:]).square().mean(-1)
        weight = torch.ones_like(batch.reward[0])
        return LossOutput({"dynamics": keep * error}, {}, states, states, weight, batch)


@dataclass(frozen=True)
class BriefConfig(ActorCriticConfig):
    horizon: Count = 3


class Brief(ActorCritic):
    """The actor-critic with a short horizon."""

    Config = BriefConfig
