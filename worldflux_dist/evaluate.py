"""Evaluation: the mean return of whole episodes, and the open loop that shows what a model knows.

Every environment contributes equally many episodes, its first ones, so that short episodes are
not counted more often than long ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from worldflux_dist.agent import Agent
from worldflux_dist.envs import EnvConfig, Envs, make_envs
from worldflux_dist.envs.acting import Act, random_act
from worldflux_dist.models.base import State

EPISODE_LIMIT = 50_000  # steps; the longest Atari game has 27,000


class NoPicturesError(ValueError):
    """The environment cannot draw itself, or the model cannot show what it imagines."""


@dataclass(frozen=True)
class Evaluation:
    """Returns of all episodes."""

    returns: tuple[float, ...]

    @property
    def mean(self) -> float:
        return float(np.mean(self.returns))

    @property
    def std(self) -> float:
        return float(np.std(self.returns))

    def __str__(self) -> str:
        return f"{self.mean:.4g} +- {self.std:.3g} over {len(self.returns)} episodes"


def greedy(agent: Agent) -> Act:
    """The agent's policy without exploration."""
    return lambda obs, is_first, carry: agent.act_batch(obs, is_first, carry, greedy=True)


def run_episodes(act: Act, envs: Envs, episodes: int) -> Evaluation:
    """Run at least `episodes` whole episodes, the same number in every environment."""
    each = -(-episodes // envs.num_envs)
    counts = np.zeros(envs.num_envs, int)
    sums = np.zeros(envs.num_envs)
    returns: list[float] = []
    step = envs.step(np.zeros((envs.num_envs, envs.spaces.action_dim), np.float32))
    carry: Any = None
    for _ in range(EPISODE_LIMIT * each):
        if (counts >= each).all():
            return Evaluation(tuple(returns))
        action, carry = act(step.obs, step.is_first, carry)
        step = envs.step(action)
        sums += step.reward
        for lane in np.flatnonzero(step.is_last):
            if counts[lane] < each:
                returns.append(float(sums[lane]))
            counts[lane] += 1
            sums[lane] = 0
    raise RuntimeError(
        f"evaluation saw an episode of more than {EPISODE_LIMIT:,} steps: give the environment an "
        "end with env.max_episode_steps"
    )


def evaluate(agent: Agent, config: EnvConfig, episodes: int, seed: int) -> Evaluation:
    """Mean return of the greedy policy in fresh environments."""
    envs = make_envs(config, seed, num_envs=min(episodes, 10))
    try:
        return run_episodes(greedy(agent), envs, episodes)
    finally:
        envs.close()


def evaluate_random(config: EnvConfig, episodes: int, seed: int) -> Evaluation:
    """Mean return of uniformly random actions: the baseline of the same protocol."""
    envs = make_envs(config, seed, num_envs=min(episodes, 10))
    try:
        return run_episodes(random_act(envs.spaces, seed), envs, episodes)
    finally:
        envs.close()


@dataclass(frozen=True)
class OpenLoop:
    """One observation of an episode (T, *shape): as it was, and as the model dreamt it.

    The model sees the first `context` steps and then only the actions. `frames` (T, h, w, 3)
    are the environment's own pictures, where it can draw.
    """

    truth: np.ndarray
    dream: np.ndarray
    frames: np.ndarray | None
    context: int


@torch.no_grad()
def open_loop(
    agent: Agent, config: EnvConfig, seed: int, context: int = 5, horizon: int = 45
) -> OpenLoop:
    """Play an episode greedily, then dream it again from its first `context` observations.

    Raises NoPicturesError for a family that does not decode observations.
    """
    if not agent.world_model.decodes_obs:
        raise NoPicturesError(
            f"{agent.recipe['model']} does not decode observations, so there is no dream to draw; "
            "look at an episode instead"
        )
    envs = make_envs(config, seed, num_envs=1, render=True)
    steps, frames = [], []
    carry: Any = None
    step = envs.step(np.zeros((1, envs.spaces.action_dim), np.float32))
    while True:
        steps.append(step)
        frames.append(envs.render())
        if len(steps) == context + horizon or step.is_last[0]:
            break
        action, carry = agent.act_batch(step.obs, step.is_first, carry, greedy=True)
        step = envs.step(action)
    envs.close()
    context = min(context, max(1, len(steps) // 2))
    model = agent.world_model
    states = [model.encode(steps[0].obs)]
    for t in range(1, len(steps)):
        went_in = torch.as_tensor(steps[t].action, device=agent.device)
        if t < context:
            states.append(model.update(states[-1], went_in, steps[t].obs))
        else:
            states.append(model.transition(states[-1], went_in))
    key = next((k for k, s in agent.spaces.obs.items() if s.kind == "image"), None)
    key = key or next(iter(agent.spaces.obs))
    decoded = model.decode(State.stack(states), ("obs",)).preds["obs"]
    dream = (decoded[key] if isinstance(decoded, dict) else decoded)[:, 0].cpu().numpy()
    truth = np.stack([step.obs[key][0] for step in steps])
    if truth.dtype == np.uint8:
        dream = np.clip(np.rint(dream), 0, 255).astype(np.uint8)
    drawn = None if frames[0] is None else np.stack([f for f in frames if f is not None])
    return OpenLoop(truth, dream, drawn, context)


def episode_frames(agent: Agent, config: EnvConfig, seed: int, limit: int = 1000) -> np.ndarray:
    """Pictures (T, h, w, 3) of one greedy episode of at most `limit` steps.

    Raises NoPicturesError where the environment cannot draw itself.
    """
    envs = make_envs(config, seed, num_envs=1, render=True)
    try:
        step = envs.step(np.zeros((1, envs.spaces.action_dim), np.float32))
        frames, carry = [], None
        while True:
            frame = envs.render()
            if frame is None:
                raise NoPicturesError(
                    f"{config.id} has no rgb_array rendering, so there is no video of it"
                )
            frames.append(frame)
            if step.is_last[0] or len(frames) == limit:
                return np.stack(frames)
            action, carry = agent.act_batch(step.obs, step.is_first, carry, greedy=True)
            step = envs.step(action)
    finally:
        envs.close()
