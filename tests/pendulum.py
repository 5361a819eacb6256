"""Pendulum-v1 under random actions: what world models of vectors are measured on, in seconds."""

from __future__ import annotations

import functools
from contextlib import closing
from typing import Any

import gymnasium as gym
import torch

from worldflux_dist.agent import Agent
from worldflux_dist.data import Chunk
from worldflux_dist.envs import EnvConfig, make_envs
from worldflux_dist.envs.base import random_act
from worldflux_dist.learner import Learner, LearnerConfig
from worldflux_dist.replay.buffer import ReplayBuffer, ReplayConfig
from worldflux_dist.report_card import ReportCard, report_card
from worldflux_dist.runner import EnvRunner
from worldflux_dist.spaces import Spaces


@functools.cache
def episodes(seed: int, num: int) -> Chunk:
    """Whole episodes (num, 201) of uniformly random actions."""
    with closing(make_envs(EnvConfig("Pendulum-v1", num), seed)) as envs:
        return EnvRunner(envs, random_act(envs.spaces, seed)).collect(201)


def trained(
    model: str,
    steps: int,
    /,
    shape: tuple[int, int] = (16, 16),
    scales: dict[str, float] | None = None,
    **options: Any,
) -> tuple[Agent, dict[str, float]]:
    """An agent whose world model has learned for so many gradient steps on batches of a shape from
    16 episodes, and the metrics of the last one. `scales` weigh its losses."""
    torch.manual_seed(0)
    env = gym.make("Pendulum-v1")
    agent = Agent(model, Spaces(env.observation_space, env.action_space), options)
    agent.world_model.loss_scales |= scales or {}
    learner = Learner(agent, LearnerConfig(device="cpu"), part="world_model")
    config = ReplayConfig(batch_size=shape[0], batch_length=shape[1], capacity=10_000)
    replay = ReplayBuffer(config)
    replay.add(episodes(seed=0, num=16))
    metrics: dict[str, float] = {}
    for _ in range(steps):
        metrics = learner.step(replay.sample())
    return agent, metrics


def card(agent: Agent, horizon: int = 15) -> ReportCard:
    """On 8 episodes that were not learned from."""
    return report_card(agent, [episodes(seed=100, num=8)], horizon)
