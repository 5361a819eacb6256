"""What tests of the RLlib algorithm share: a small configuration, and what results must hold."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gymnasium.envs.classic_control import CartPoleEnv
from ray.rllib.core import DEFAULT_MODULE_ID

from worldflux_dist.agent import Agent
from worldflux_dist.rllib import WorldFluxConfig


class Sticky(CartPoleEnv):
    """Hangs once, which the file `config["mark"]` tells from then on."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.mark, self.taken = Path(config["mark"]), 0

    def step(self, action: Any) -> Any:
        self.taken += 1
        if self.taken == 100 and not self.mark.exists():
            self.mark.touch()
            time.sleep(3600)
        return super().step(action)


class Closing(CartPoleEnv):
    """Takes its time, and leaves the file `config["mark"]` when it is closed."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.mark = Path(config["mark"])

    def step(self, action: Any) -> Any:
        time.sleep(0.003)
        return super().step(action)

    def close(self) -> None:
        self.mark.touch()
        super().close()


PATIENCE_S = 300.0  # of tests: what takes longer has failed, however busy the machine is
BATCH = {"batch_size": 4, "batch_length": 16}
BATCH_STEPS = BATCH["batch_size"] * BATCH["batch_length"]


def small(num_env_runners: int = 0, num_learners: int = 0, **training: Any) -> WorldFluxConfig:
    """CartPole with the tiny model: an iteration of 256 env steps takes a second."""
    config = (
        WorldFluxConfig(model="dreamerv3:tiny")
        .environment("CartPole-v1")
        .env_runners(
            num_env_runners=num_env_runners,
            num_envs_per_env_runner=4,
            rollout_fragment_length=16,
        )
        .learners(num_learners=num_learners)
        .debugging(seed=0)
    )
    config.min_sample_timesteps_per_iteration = 256
    settings = {"train_ratio": 8, "prefill": 128, "replay": BATCH, "num_replay_shards": 2}
    return config.training(**settings | training)


def agent_of(learner: Any) -> Agent:
    """The agent that a learner trains."""
    agent: Agent = learner.module[DEFAULT_MODULE_ID].agent
    return agent


def until(condition: Any, algo: Any, seconds: float = PATIENCE_S) -> dict[str, Any]:
    """Train until a result is as wanted."""
    deadline = time.monotonic() + seconds
    while True:
        result = algo.train()
        if condition(result):
            return result
        assert time.monotonic() < deadline, result


def check_ratio(result: dict[str, Any], ratio: float = 8) -> None:
    """The replayed steps are the asked ones to within one batch."""
    env_steps, gradient_steps = result["replay"]["env_steps"], result["gradient_steps"]
    assert gradient_steps > 0
    assert abs(env_steps * ratio - gradient_steps * BATCH_STEPS) < BATCH_STEPS
    assert result["train_ratio"]["achieved"] == pytest.approx(
        gradient_steps * BATCH_STEPS / env_steps
    )


def weights(algo: Any, group: Any = None) -> list[dict[str, np.ndarray]]:
    """The weights of every learner's agent."""
    found = (group or algo.learner_group).foreach_learner(_weights)
    return [each.get() for each in found]


def _weights(learner: Any) -> dict[str, np.ndarray]:
    return {name: x.cpu().numpy().copy() for name, x in agent_of(learner).state_dict().items()}


def same(one: dict[str, np.ndarray], other: dict[str, np.ndarray], part: str = "") -> bool:
    return one.keys() == other.keys() and all(
        np.array_equal(value, other[name]) for name, value in one.items() if name.startswith(part)
    )
