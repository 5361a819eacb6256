"""The whole system in one process: read this first.

No Ray, no files, deterministic for a fixed seed. The distributed trainer runs the same loop with
every part in a process of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from worldflux_dist.agent import Agent
from worldflux_dist.config import Config
from worldflux_dist.envs import make_envs
from worldflux_dist.envs.base import random_act
from worldflux_dist.evaluate import Evaluation, evaluate
from worldflux_dist.learner import Learner
from worldflux_dist.replay.buffer import ReplayBuffer
from worldflux_dist.replay.limiter import Limiter
from worldflux_dist.runner import EnvRunner


@dataclass(frozen=True)
class Result:
    """What training led to. `evaluation` is the greedy policy's, `random` the baseline's."""

    agent: Agent
    limiter: Limiter
    evaluation: Evaluation
    random: Evaluation


def train(
    config: Config, log: Callable[[int, dict[str, float]], None] = lambda env_steps, metrics: None
) -> Result:
    """Collect, store, learn; `log(env_steps, metrics)` is called after every gradient step."""
    torch.manual_seed(config.seed)
    envs = make_envs(config.env, config.seed)
    agent = config.make_agent(envs.spaces)
    learner = Learner(agent, config.learner)
    replay = ReplayBuffer(config.replay, config.seed)
    runner = EnvRunner(envs, random_act(envs.spaces, config.seed))
    batch_steps = config.replay.batch_size * config.replay.batch_length
    limiter = Limiter(config.train.train_ratio, batch_steps, config.train.prefill)

    while limiter.env_steps < config.train.env_steps:
        chunk = runner.collect(config.scale.chunk_length)
        replay.add(chunk)
        limiter.inserted(chunk.num_steps)
        while limiter.owed and replay.ready:
            metrics = learner.step(replay.sample())
            limiter.sampled()
            runner.act = agent.act_batch
            log(limiter.env_steps, metrics)

    envs.close()
    episodes, seed = config.train.eval_episodes, config.seed + 1
    return Result(
        agent,
        limiter,
        evaluate(agent, config.env, episodes, seed),
        evaluate(None, config.env, episodes, seed),
    )
