"""What a behavior is: it sees features of any family, acts, values, and adds its losses.

Two learn here: actor_critic.py in imagination, also apart from the model on `Imagined` batches;
latent_td.py by temporal differences on replayed steps. planner.py chooses actions with a model and
a behavior's values and proposals.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.optim import Optimizer

from worldflux_dist.data import Batch
from worldflux_dist.models.base import LossOutput, Rollout, WorldModel
from worldflux_dist.nn.packing import Part, pack, unpack
from worldflux_dist.settings import Settings


@dataclass
class Imagined:
    """Trajectories imagined from all N = B * T states of a replayed batch, row after row; arrays or
    tensors without gradient.

    features (H + 1, N, F) with the starts, actions (H, N, A), rewards (H, N) and continues (H, N)
    of states 1..H, start_continue (N,); reward, is_last and is_terminal (B, T) are the replayed
    steps' own. `log_prob` (H, N) is what the policy that acted, older than the learner's,
    gave to the actions; None where it was the learner's own. The versions are those of the weights
    that imagined. Between processes features are packed, as bytes and `ranges` (nn/packing.py).
    """

    features: Any
    actions: Any
    rewards: Any
    continues: Any
    start_continue: Any
    reward: Any
    is_last: Any
    is_terminal: Any
    log_prob: Any = None
    ranges: Any = None
    model_version: int = 0
    policy_version: int = 0

    @classmethod
    def of(cls, world_model: WorldModel, rollout: Rollout, batch: Batch) -> Imagined:
        """A rollout from the flattened states of `batch`, as policies and critics see it."""
        features = world_model.features(rollout.states).detach()
        taken = (rollout.actions, rollout.rewards, rollout.continues, rollout.start_continue)
        return cls(features, *taken, batch.reward, batch.is_last, batch.is_terminal)

    def packed(self, parts: Sequence[Part]) -> Imagined:
        """As tensors for others, which see features that are made of such parts rounded."""
        features, ranges = pack(self.features, parts)
        return replace(self, features=features, ranges=ranges)

    def unpacked(self, parts: Sequence[Part]) -> Imagined:
        """With features to compute on; itself where it is not packed."""
        if self.ranges is None:
            return self
        return replace(self, features=unpack(self.features, self.ranges, parts), ranges=None)

    def _arrays(self) -> dict[str, Any]:
        return {n: x for n, x in vars(self).items() if not isinstance(x, int | None)}

    def map(self, function: Callable[[Any], Any]) -> Imagined:
        """Apply `function` to every array."""
        return replace(self, **{name: function(x) for name, x in self._arrays().items()})

    def rows(self, index: slice) -> Imagined:
        """What was imagined from these rows (a slice of B without a step)."""
        num, length = self.reward.shape
        first, last, _ = index.indices(num)
        starts = slice(first * length, last * length)

        def part(name: str, value: Any) -> Any:
            if name in ("reward", "is_last", "is_terminal"):
                return value[index]
            if name == "ranges":
                return value
            return value[starts] if name == "start_continue" else value[:, starts]

        return replace(self, **{name: part(name, x) for name, x in self._arrays().items()})


@dataclass
class BehaviorLoss:
    """Unreduced losses by name, metrics, and what a policy with an optimizer of its own learns from
    once all else has stepped: features (B, T, F), detached, and what step t counts, (T,)."""

    losses: dict[str, Tensor]
    metrics: dict[str, Tensor]
    path: tuple[Tensor, Tensor] | None = None


class Behavior(nn.Module, ABC):
    """Policy and value of features, made from (feature_dim, width, action parts, config).

    `Config` is the class of its settings, `loss_scales` weighs its losses, `pieces` names methods
    that are worth compiling (compiled.py).
    """

    Config: ClassVar[type[Settings]]
    pieces: ClassVar[tuple[str, ...]] = ()
    loss_scales: dict[str, float]

    @abstractmethod
    def act(self, features: Tensor, greedy: bool = False, noise: Tensor | None = None) -> Tensor:
        """Features (..., F) -> flat actions (..., A); `noise` (..., A) fixes the draws."""

    @abstractmethod
    def value(self, features: Tensor, noise: Any = None) -> Tensor:
        """Features (..., F) -> expected discounted return (...); `noise` from `value_noise`."""

    def expected_value(self, features: Tensor) -> Tensor:
        """As `value`, where that draws at random without its draws."""
        return self.value(features)

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
