"""RLlib's EpisodeReplayBuffer in an actor, fed and asked as our shards are."""

from __future__ import annotations

import uuid
import warnings
from typing import Any

import ray

from worldflux_dist.data import Chunk

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # RLlib loads what it may need, which warns
    from ray.rllib.env.single_agent_episode import SingleAgentEpisode
    from ray.rllib.utils.replay_buffers.episode_replay_buffer import EpisodeReplayBuffer


def episodes_of(chunk: Chunk) -> list[SingleAgentEpisode]:
    """Every environment's steps as an episode of arrays, as RLlib's env runners send them."""
    return [
        SingleAgentEpisode(
            observations=list(chunk.obs["obs"][row]),
            actions=list(chunk.action[row, 1:]),
            rewards=chunk.reward[row, 1:].tolist(),
            len_lookback_buffer=0,
        ).to_numpy()
        for row in range(len(chunk.streams))
    ]


def renamed(episodes: list[SingleAgentEpisode]) -> list[SingleAgentEpisode]:
    """The same episodes as new ones."""
    for episode in episodes:
        episode.id_ = uuid.uuid4().hex
    return episodes


class RllibReplay:
    """Owns the buffer; `sample` has the two results of ReplayShardActor's."""

    def __init__(self, capacity: int, length: int) -> None:
        self.buffer = EpisodeReplayBuffer(capacity, batch_length_T=length)

    def add(self, episodes: list[SingleAgentEpisode]) -> None:
        self.buffer.add(episodes)

    @ray.method(num_returns=2)
    def sample(self, batch_size: int) -> tuple[bool, Any]:
        return True, self.buffer.sample(batch_size_B=batch_size)
