"""RLlib's own way of bringing weights to its env runners, with a module of a given size."""

from __future__ import annotations

import logging
import time
import warnings
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # RLlib loads what it may need, which warns
    from ray.rllib.algorithms.ppo import PPOConfig
    from ray.rllib.core.rl_module.default_model_config import DefaultModelConfig
    from ray.rllib.env.env_runner_group import EnvRunnerGroup


class IdleEnv(gymnasium.Env):
    """24 numbers to see, 6 actions; nobody steps it."""

    def __init__(self, config: Any = None) -> None:
        self.observation_space = spaces.Box(-1, 1, (24,), np.float32)
        self.action_space = spaces.Discrete(6)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict]:
        return np.zeros(24, np.float32), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict]:
        return np.zeros(24, np.float32), 0.0, True, False, {}


class RllibRunners:
    """Owns `num` env runners whose module has hidden layers of `hidden` units."""

    def __init__(self, num: int, hidden: tuple[int, ...]) -> None:
        config = (
            PPOConfig()
            .environment(IdleEnv)
            .env_runners(num_env_runners=num, num_cpus_per_env_runner=0)
            .fault_tolerance(restart_failed_env_runners=False)
            .rl_module(
                model_config=DefaultModelConfig(fcnet_hiddens=list(hidden), vf_share_layers=True)
            )
        )
        logging.getLogger("ray.rllib").setLevel(logging.ERROR)  # it says that its API is new
        config.validate()
        self.group = EnvRunnerGroup(config=config)
        local: Any = self.group.local_env_runner
        state = local.module.get_state(inference_only=True)
        self.nbytes = sum(value.nbytes for value in state.values())

    def push(self) -> list[float]:
        """Seconds from the call until each runner has the weights."""
        start = time.monotonic()
        self.group.sync_weights(inference_only=True)
        # Calls of one runner are served in turn, so this one tells when it was through.
        found = self.group.foreach_env_runner(lambda _: time.monotonic(), local_env_runner=False)
        return [applied - start for applied in found]

    def stop(self) -> None:
        self.group.stop()
