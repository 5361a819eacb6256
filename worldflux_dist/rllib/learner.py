"""Our learner inside RLlib's: RLlib starts, places, saves and restores it, and it steps by itself.

The same gradient steps as everywhere in this package: RLlib's own update knows neither stages nor
their order. What must stay true: all ranks hold the same weights after each step, and a restored
learner goes on as the saved one would have, with the learning rate that is configured now.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import ray
import torch
from ray.rllib.core.learner.learner_group import LearnerGroup as RLlibLearners
from ray.rllib.core.learner.torch.torch_learner import TorchLearner

from worldflux_dist.behaviors.base import Imagined
from worldflux_dist.data import Batch
from worldflux_dist.distributed.group import LearnerGroup
from worldflux_dist.distributed.rank import Rank, trains_on_rows
from worldflux_dist.distributed.weights import Version
from worldflux_dist.learner import Learner

STATE = "worldflux"  # our part of a learner's state


class WorldFluxLearner(TorchLearner):
    """One rank: trains the part of the agent that `config.part` names."""

    def configure_optimizers_for_module(self, module_id: str, config: Any = None) -> None:
        """Make the learner, whose optimizers RLlib saves with the rest."""
        settings, part = self.config.settings(str(self.device)), self.config.part
        agent = self.module[module_id].agent
        self.learner = Learner(agent, settings.learner, part, trains_on_rows(settings, part))
        for name, optimizer in self.learner.optimizers.items():
            params = [p for group in optimizer.param_groups for p in group["params"]]
            self.register_optimizer(
                module_id=module_id, optimizer_name=name, optimizer=optimizer, params=params
            )

    def connect(self, store: Any, shards: Sequence[Any], generation: int) -> None:
        """From now on, publish to `store` and tell `shards` how surprising their windows were."""
        self.rank = Rank(self.learner, store, shards, generation)

    def begin(
        self, shard: int, given: tuple[Batch, np.ndarray] | Imagined
    ) -> dict[str, Any] | None:
        """As Rank's."""
        return self.rank.begin(shard, given)

    def finish(self) -> dict[str, Any] | None:
        """As Rank's."""
        return self.rank.finish()

    def weights(self) -> tuple[Version, dict[str, np.ndarray]]:
        """As Rank's."""
        return self.rank.weights()

    def get_state(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        learner = self.learner
        own = {"gradient_steps": learner.gradient_steps, "random": learner.random_state()}
        return super().get_state(*args, **kwargs) | {STATE: own}

    def set_state(self, state: dict[str, Any]) -> None:
        super().set_state(state)
        if STATE not in state:
            return
        self.learner.gradient_steps = state[STATE]["gradient_steps"]
        self.learner.set_random_state(state[STATE]["random"])
        if self.learner.rank:  # the state is rank 0's: the others draw numbers of their own
            torch.manual_seed(int(torch.randint(2**62, ())) + self.learner.rank)

    def compute_loss_for_module(self, **kwargs: Any) -> Any:
        raise NotImplementedError("WorldFluxLearner.step computes its losses by itself")

    def _set_optimizer_state(self, state: dict[str, Any]) -> None:
        """Moments and counts only: learning rates and the like are as configured now."""
        for name, optimizer in self._named_optimizers.items():
            if name in state:
                groups = copy.deepcopy([_plain(group) for group in optimizer.param_groups])
                super()._set_optimizer_state({name: state[name]})
                for group, own in zip(optimizer.param_groups, groups, strict=True):
                    group.update(own)

    def _make_modules_ddp_if_necessary(self) -> None:
        """Ranks share gradients by stage, which the learner does itself."""
        if self.config.num_learners > 1:
            rank = torch.distributed.get_rank()
            self.learner.share(rank)
            if self.config.seed is not None:  # RLlib gives all ranks the same one
                torch.manual_seed(self.config.seed * 1000 + rank)


def _plain(group: dict[str, Any]) -> dict[str, Any]:
    """What is configured of a group of parameters; `steps` is how far its warm-up has come."""
    return {name: value for name, value in group.items() if name not in ("params", "steps")}


class RLlibGroup(LearnerGroup):
    """The ranks of a group that RLlib has started."""

    def __init__(self, group: RLlibLearners, part: str, store: Any) -> None:
        super().__init__(part, store)
        self.group = group

    def connect(self, shards: Sequence[Any]) -> None:
        """Have the learners, as they are now, publish with a generation of their own."""
        self.renew()
        connect = partial(
            _connect, store=self.store, shards=list(shards), generation=self.generation
        )
        self.gradient_steps, *_ = [done.get() for done in self.group.foreach_learner(connect)]
        self.ranks = (
            [handle.get() for handle in self.group.foreach_learner(_handle)]
            if self.group.is_remote
            else [self.group._learner]
        )

    def hand_over(self, part: str, other: RLlibGroup) -> None:
        """Have `other` hold what these learners hold of a part of the agent."""
        first, *_ = self.group.foreach_learner(partial(_arrays, part=part))
        for done in other.group.foreach_learner(partial(_load, arrays=first.get())):
            done.get()


def _connect(learner: WorldFluxLearner, store: Any, shards: list[Any], generation: int) -> int:
    learner.connect(store, shards, generation)
    return learner.learner.gradient_steps


def _handle(learner: WorldFluxLearner) -> Any:
    return ray.get_runtime_context().current_actor


def _arrays(learner: WorldFluxLearner, part: str) -> dict[str, np.ndarray]:
    return learner.learner.agent.part_arrays(part)


def _load(learner: WorldFluxLearner, arrays: dict[str, np.ndarray]) -> None:
    learner.learner.agent.load_arrays(arrays)
