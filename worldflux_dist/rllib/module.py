"""The agent as an RLModule: what RLlib builds, sends, saves and asks for actions.

Learners hold the whole agent, env runners what acting needs. Acting is stateful: the state that
goes in and comes out is the agent's memory and a flag for the first step of an episode.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from ray.rllib.core.columns import Columns
from ray.rllib.core.rl_module.apis import InferenceOnlyAPI
from ray.rllib.core.rl_module.torch import TorchRLModule
from torch import Tensor

from worldflux_dist.agent import Agent
from worldflux_dist.spaces import Spaces

FRESH = "is_first"  # in the state: 1 before the first step of an episode


class WorldFluxModule(TorchRLModule, InferenceOnlyAPI):
    """Owns the agent (`module.agent`), made from `model_config` and the environment's spaces.

    `forward_inference` acts without exploration, `forward_exploration` with it; both take
    observations in the environment's own space with leading shape (B,) or (B, 1) and, but for the
    first step, the last `state_out` as `state_in`. They give actions of the environment's own
    action space with the same leading shape.
    """

    def setup(self) -> None:
        made = {name: self.model_config[name] for name in ("model_options", "behavior", "planner")}
        spaces = Spaces(self.observation_space, self.action_space)
        self.agent = Agent(self.model_config["model"], spaces, **made)
        self._unused = [f"agent.{path}" for path in self.agent.unused()]
        if self.inference_only:
            self.agent.drop_unused()

    def get_non_inference_attributes(self) -> list[str]:
        """Paths of the submodules that acting does not need."""
        return self._unused

    def get_initial_state(self) -> dict[str, Tensor]:
        """The state before the first step of one episode, without a batch axis."""
        carry = self.agent.initial_carry(1)
        state = {name: value[0].cpu() for name, value in carry.items()}
        return state | {FRESH: torch.ones(())}

    def _forward_inference(self, batch: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        return self._act(batch, greedy=True)

    def _forward_exploration(self, batch: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        return self._act(batch, greedy=False)

    def _forward_train(self, batch: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        raise RuntimeError(
            "WorldFluxModule is trained by WorldFluxLearner.step alone: leave learner_class as it "
            "is, or call module.agent(batch) for the loss of a batch"
        )

    def _act(self, batch: dict[str, Any], greedy: bool) -> dict[str, Any]:
        obs = _map(_numpy, batch[Columns.OBS])
        timed = self._has_time(obs)
        obs = self.agent.spaces.encode_obs(_map(lambda x: x[:, 0], obs) if timed else obs)
        num = len(next(iter(obs.values())))
        state = dict(batch.get(Columns.STATE_IN) or {})
        first = np.ones(num, bool)
        carry: dict[str, Tensor] | None = None
        if state:
            first = _numpy(state.pop(FRESH)).reshape(num) > 0.5
            carry = {n: torch.as_tensor(x, device=self.agent.device) for n, x in state.items()}
        flat, carry = self.agent.act_batch(obs, first, carry, greedy)
        actions = self.agent.spaces.decode_action(flat)
        return {
            Columns.ACTIONS: _map(lambda x: torch.as_tensor(x[:, None] if timed else x), actions),
            Columns.STATE_OUT: carry | {FRESH: torch.zeros(num)},
        }

    def _has_time(self, obs: Any) -> bool:
        """Whether observations are (B, T = 1, ...) and not (B, ...)."""
        spec = next(iter(self.agent.spaces.obs.values()))
        space: Any = self.observation_space
        for key in spec.path:
            obs, space = obs[key], space[key]
        return bool(np.ndim(obs) == len(space.shape) + 2)


def _numpy(value: Any) -> np.ndarray:
    return value.cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)


def _map(function: Any, nested: Any) -> Any:
    if isinstance(nested, dict):
        return {key: _map(function, value) for key, value in nested.items()}
    if isinstance(nested, tuple):
        return tuple(_map(function, value) for value in nested)
    return function(nested)
