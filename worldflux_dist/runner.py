"""The env runner: steps environments with a policy and cuts what came out into chunks.

Plain Python, no Ray and no torch: the policy is any callable, so acting may happen here, in
another process or at random.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from worldflux_dist.data import Chunk, Step, new_incarnation
from worldflux_dist.envs import Envs
from worldflux_dist.envs.base import Act

EPISODE_LIMIT = 50_000  # steps of an evaluation's episode; the longest Atari game has 27,000


class EndlessEpisodeError(RuntimeError):
    """An episode that is to be played to its end has none."""


@dataclass(frozen=True)
class Episode:
    """A finished episode: the sum of its rewards, the number of its actions, and the lane, the
    environment's number among the runner's, that it was played in."""

    total_reward: float
    length: int
    lane: int = 0


class EnvRunner:
    """Owns N environments and the policy's memory. Its chunks follow each other without a gap.

    `writer` names it for good, `first_stream` numbers its environments among all runners'. Before
    every action `refresh` may bring newer weights; `acted` has, for each action of the last chunk,
    the time (seconds since the epoch) and the version of the weights that chose it. `num_actions`
    counts the steps that were no resets.
    """

    def __init__(
        self, envs: Envs, act: Act, writer: str = "runner-0", first_stream: int = 0
    ) -> None:
        self.envs, self.act, self.writer = envs, act, writer
        self.streams = first_stream + np.arange(envs.num_envs)
        self.incarnation, self.seq = new_incarnation(), 0
        self.version = 0
        self.refresh: Callable[[], object] = lambda: None
        self.acted: list[tuple[float, int]] = []
        self._step: Step | None = None
        self._carry: Any = None
        self._reward = np.zeros(envs.num_envs)
        self._length = np.zeros(envs.num_envs, int)
        self._episodes: list[Episode] = []
        self.num_actions = 0

    def collect(self, length: int) -> Chunk:
        """The next `length` steps of every environment: a chunk (N, length)."""
        columns: dict[str, np.ndarray] = {}
        self.acted = []
        for t in range(length):
            step = self._next()
            for name, value in step.columns().items():
                if t == 0:
                    shape = (len(value), length, *value.shape[1:])
                    columns[name] = np.empty(shape, value.dtype)
                columns[name][:, t] = value
        key = (self.writer, self.incarnation, self.seq)
        self.seq += 1
        version = min((version for _, version in self.acted), default=self.version)
        chunk = Chunk.from_columns(columns, streams=self.streams, version=version, key=key)
        chunk.check()
        return chunk

    def whole_episodes(self, num: int) -> list[Episode]:
        """At least `num` whole episodes: the first ones of every environment, as many of each, so
        that short ones do not count more often.

        For a runner that has not collected anything. Raises EndlessEpisodeError, with a remedy,
        for an episode of more than EPISODE_LIMIT steps.
        """
        each = -(-num // self.envs.num_envs)
        counts = np.zeros(self.envs.num_envs, int)
        episodes: list[Episode] = []
        while (counts < each).any():
            self._next()
            if self._length[counts < each].max(initial=0) > EPISODE_LIMIT:
                raise EndlessEpisodeError(
                    f"evaluation saw an episode of more than {EPISODE_LIMIT:,} steps: give the "
                    "environment an end with env.max_episode_steps, or wrap your own in "
                    "gymnasium.wrappers.TimeLimit"
                )
            for episode in self.take_episodes():
                if counts[episode.lane] < each:
                    episodes.append(episode)
                counts[episode.lane] += 1
        return episodes

    def take_episodes(self) -> list[Episode]:
        """Episodes that ended since the last call."""
        taken, self._episodes = self._episodes, []
        return taken

    def _next(self) -> Step:
        if self._step is None:
            action = np.zeros((self.envs.num_envs, self.envs.spaces.action_dim), np.float32)
        else:
            self.refresh()
            action, self._carry = self.act(self._step.obs, self._step.is_first, self._carry)
            self.acted.append((time.time(), self.version))
        self._step = step = self.envs.step(action)
        self._reward += step.reward
        self._length += ~step.is_first
        self.num_actions += int((~step.is_first).sum())
        for lane in np.flatnonzero(step.is_last):
            total, length = float(self._reward[lane]), int(self._length[lane])
            self._episodes.append(Episode(total, length, int(lane)))
            self._reward[lane], self._length[lane] = 0, 0
        return step
