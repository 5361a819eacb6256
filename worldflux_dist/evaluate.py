"""Evaluation: returns of whole episodes, the open loop that shows what a model knows, and held-out
steps for its report card (report_card.py)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import torch

from worldflux_dist.agent import Agent
from worldflux_dist.data import Chunk, Step, Steps
from worldflux_dist.envs import EnvConfig, make_envs
from worldflux_dist.envs.base import Act, random_act
from worldflux_dist.models.base import State
from worldflux_dist.report_card import report_card as report_card
from worldflux_dist.runner import EnvRunner

HELD_OUT_STEPS = 5_000  # of each environment, where episodes are long


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


def evaluate(agent: Agent | None, config: EnvConfig, episodes: int, seed: int) -> Evaluation:
    """Returns of the greedy policy in fresh environments; without an agent those of uniformly
    random actions, the baseline of the same protocol. Raises EndlessEpisodeError."""
    with closing(make_envs(config, seed, num_envs=min(episodes, 10))) as envs:
        runner = EnvRunner(envs, greedy(agent) if agent else random_act(envs.spaces, seed))
        return Evaluation(tuple(e.total_reward for e in runner.whole_episodes(episodes)))


def held_out(agent: Agent, config: EnvConfig, episodes: int, seed: int) -> Steps:
    """Steps (N, T) of at least so many greedy episodes in fresh environments, for a report card;
    fewer where they are longer than HELD_OUT_STEPS."""
    with closing(make_envs(config, seed, num_envs=min(episodes, 10))) as envs:
        runner, ended = EnvRunner(envs, greedy(agent)), 0
        chunks: list[Chunk] = []
        while ended < episodes and 64 * len(chunks) < HELD_OUT_STEPS:
            chunks.append(runner.collect(64))
            ended += len(runner.take_episodes())
    columns = [chunk.columns() for chunk in chunks]
    return Steps.from_columns(
        {name: np.concatenate([c[name] for c in columns], 1) for name in columns[0]}
    )


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
    steps, frames = zip(*_look(agent, config, seed, context + horizon), strict=True)
    context = min(context, max(1, len(steps) // 2))
    model = agent.world_model
    states = [model.encode(steps[0].obs)]
    for t in range(1, len(steps)):
        went_in = torch.as_tensor(steps[t].action, device=agent.device)
        if t < context:
            states.append(model.update(states[-1], went_in, steps[t].obs))
        else:
            states.append(model.transition(states[-1], went_in))
    key = next(iter(agent.spaces.images or agent.spaces.obs))
    decoded = model.decode(State.stack(states), ("obs",)).preds["obs"]
    dream = (decoded[key] if isinstance(decoded, dict) else decoded)[:, 0].cpu().numpy()
    truth = np.stack([step.obs[key][0] for step in steps])
    if truth.dtype == np.uint8:
        dream = np.clip(np.rint(dream), 0, 255).astype(np.uint8)
    drawn = [frame for frame in frames if frame is not None]
    return OpenLoop(truth, dream, np.stack(drawn) if len(drawn) == len(steps) else None, context)


def episode_frames(agent: Agent, config: EnvConfig, seed: int, limit: int = 1000) -> np.ndarray:
    """Pictures (T, h, w, 3) of one greedy episode of at most `limit` steps, until one fails.

    Raises NoPicturesError where the environment cannot draw itself.
    """
    frames = []
    for _, frame in _look(agent, config, seed, limit):
        if frame is None:
            break
        frames.append(frame)
    if not frames:
        raise NoPicturesError(f"{config.id} has no rgb_array rendering, so there is no video of it")
    return np.stack(frames)


def _look(
    agent: Agent, config: EnvConfig, seed: int, limit: int
) -> Iterator[tuple[Step, np.ndarray | None]]:
    """The steps of one greedy episode, at most `limit`, each with its picture or None."""
    with closing(make_envs(config, seed, num_envs=1, render=True)) as envs:
        act, carry = greedy(agent), None
        step = envs.step(np.zeros((1, envs.spaces.action_dim), np.float32))
        for t in range(limit):
            yield step, envs.render()
            if step.is_last[0] or t == limit - 1:
                return
            action, carry = act(step.obs, step.is_first, carry)
            step = envs.step(action)
