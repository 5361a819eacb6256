"""What a behavior is: it sees features of any family, acts, values, and adds its losses.

Two learn here: actor_critic.py in imagination, latent_td.py by temporal differences on replayed
steps. planner.py chooses actions with a model and a behavior's values and proposals.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from worldflux_dist.models.base import LossOutput, WorldModel


@dataclass
class BehaviorLoss:
    """Unreduced losses by name, metrics, and what a policy with an optimizer of its own learns from
    once all else has stepped: features (B, T, F), detached, and what step t counts, (T,)."""

    losses: dict[str, Tensor]
    metrics: dict[str, Tensor]
    path: tuple[Tensor, Tensor] | None = None


class Behavior(nn.Module, ABC):
    """Policy and value of features. `loss_scales` weighs its losses."""

    loss_scales: dict[str, float]

    @abstractmethod
    def act(self, features: Tensor, greedy: bool = False, noise: Tensor | None = None) -> Tensor:
        """Features (..., F) -> flat actions (..., A); `noise` (..., A) fixes the draws."""

    @abstractmethod
    def value(self, features: Tensor, noise: Any = None) -> Tensor:
        """Features (..., F) -> expected discounted return (...); `noise` from `value_noise`."""

    @abstractmethod
    def loss(self, world_model: WorldModel, output: LossOutput) -> BehaviorLoss:
        """Losses beside the world model's own, whose states they may start from or reach into."""

    @abstractmethod
    def update_targets(self) -> None:
        """After every gradient step."""

    @abstractmethod
    def inference_modules(self, planning: bool = False) -> tuple[str, ...]:
        """Names of the submodules that `act`, and with `planning` also `value`, needs."""

    def value_noise(self, shape: Sequence[int], device: Any) -> Any:
        """What fixes the draws of `value` on features (*shape, F); None where there are none."""
        return None

    def policy_optimizer(self) -> Optimizer | None:
        """The optimizer of a policy that learns apart, from `policy_loss`."""
        return None

    def policy_loss(self, features: Tensor, weight: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss () of a policy that learns apart, on a path, and metrics."""
        raise NotImplementedError(f"the policy of {type(self).__name__} learns with all else")
